-- A rebuild's entries, links and versions come as the shard's Postgres copies them out. What is derived of them is made here, and tables
-- are compared by hashes first.

-- The sellers' postings of entries, as `fold` (fold.py) makes them.
create function oncepay.postings_of(accounts text[], amounts bigint[], sellers text[])
    returns table (seller text, amount bigint, total bigint, fee bigint, debit bigint, credit bigint, named boolean)
    language sql immutable parallel safe as $$
    select n.seller,
           coalesce(-sum(p.amount) filter (where n.seller = p.owner and (p.named = '' or p.named = p.owner)
                                              or n.seller = p.named and p.named = 'platform' and p.account = 'platform:fees'), 0)::bigint,
           coalesce(-sum(p.amount) filter (where n.seller = p.named), 0)::bigint,
           coalesce(-sum(p.amount) filter (where n.seller = p.named and p.named <> 'platform' and p.account = 'platform:fees'), 0)::bigint,
           sum(greatest(p.amount, 0)) filter (where n.seller = p.owner)::bigint,
           sum(greatest(-p.amount, 0)) filter (where n.seller = p.owner)::bigint,
           bool_or(n.seller = p.named)
    from (
        select u.account, u.amount, coalesce(u.named, '') as named,
               case when u.account like 'seller:%:payable' then substr(u.account, 8, length(u.account) - 15) else '' end as owner
        from unnest(accounts, amounts, sellers) u (account, amount, named)) p
    cross join lateral (select p.owner union select p.named) n (seller)
    where n.seller <> ''
    group by n.seller
$$;

-- So of accounts that are codes.
create function oncepay.coded_postings_of(accounts text[], amounts bigint[])
    returns table (seller text, amount bigint, total bigint, fee bigint, debit bigint, credit bigint, named boolean)
    language sql immutable parallel safe as $$
    select substr(u.code, 2),
           coalesce(-sum(u.amount) filter (where left(u.code, 1) = 'P' or u.code = 'Fplatform'), 0)::bigint,
           -sum(u.amount)::bigint,
           coalesce(-sum(u.amount) filter (where left(u.code, 1) = 'F' and u.code <> 'Fplatform'), 0)::bigint,
           sum(greatest(u.amount, 0)) filter (where left(u.code, 1) = 'P')::bigint,
           sum(greatest(-u.amount, 0)) filter (where left(u.code, 1) = 'P')::bigint,
           true
    from unnest(accounts, amounts) u (code, amount)
    where left(u.code, 1) in ('P', 'F') and u.code <> 'F'
    group by 1
$$;

-- Sees that what came is of the shard, its slots and the position p_lsn. Raises data_exception for what isn't.
create function oncepay.check_rebuild(p_staged boolean, p_shard text, p_slots int4multirange, p_lsn pg_lsn, p_rows bigint[])
    returns void
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    of_tables constant text[] := array['entry_rows', 'link_rows', 'payments', 'payment_versions'];
    found bigint;
begin
    for n in 1 .. cardinality(of_tables) loop
        continue when p_rows[n] is null;
        execute format('select count(*) from %s where shard = $1 and slot <@ $2 %s',
                       case when p_staged then 'pg_temp.' || quote_ident('staged_' || of_tables[n])
                            else 'oncepay.' || quote_ident(of_tables[n]) end,
                       case when of_tables[n] <> 'payment_versions' then 'and lsn = $3' end)
        into found using p_shard, p_slots, p_lsn;
        if found <> p_rows[n] then
            raise data_exception using message = format(
                '%s rows of %s came, %s are of shard %s, its slots and the position %s', p_rows[n], of_tables[n], found, p_shard, p_lsn);
        end if;
    end loop;
end $$;

-- The postings of all entries in the slots. Where they go to a table with an index they come in its order.
create function oncepay.derive_postings(p_staged boolean, p_slots int4multirange) returns void
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    columns constant text := 'shard, key, entry_id, kind, currency, slot, created_at, lsn';
begin
    execute format(
        'insert into %1$s (%3$s, seller, amount, total, fee, debit, credit, named)
         select %4$s, b.seller, b.amount, b.total, b.fee, b.debit, b.credit, b.named
         from %2$s e cross join lateral oncepay.coded_postings_of(e.accounts, e.amounts) b
         where e.sellers is null and e.slot <@ $1
         union all
         select %4$s, b.seller, b.amount, b.total, b.fee, b.debit, b.credit, b.named
         from %2$s e cross join lateral oncepay.postings_of(e.accounts, e.amounts, e.sellers) b
         where e.sellers is not null and e.slot <@ $1
         %5$s',
        case when p_staged then 'pg_temp.staged_seller_postings' else 'oncepay.seller_postings' end,
        case when p_staged then 'pg_temp.staged_entry_rows' else 'oncepay.entry_rows' end,
        columns, 'e.' || replace(columns, ', ', ', e.'),
        case when not p_staged then 'order by seller, currency, created_at' end) using p_slots;
end $$;

-- As in 0013. First both sides' rows are hashed, by slot: what has the same number of rows and the same sum of hashes is the same. A
-- row's hash is hashed once more, for the sum of records' hashes doesn't tell two rows from the same two with a value exchanged.
create or replace function oncepay.take_staged(p_table text, p_key text[], p_slots int4multirange, p_lsn pg_lsn) returns bigint
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    staged_table constant text := 'staged_' || p_table;
    columns text;
    hashed text;
    content text;
    had bigint;
    staged bigint;
    gone bigint;
    come bigint;
begin
    select string_agg(quote_ident(attname), ', ' order by attnum),
           string_agg(quote_ident(attname), ', ' order by attnum) filter (where attname <> 'lsn'),
           string_agg('x.' || quote_ident(attname), ', ' order by attnum) filter (where attname <> 'lsn' and attname <> all (p_key))
    into columns, hashed, content
    from pg_catalog.pg_attribute
    where attrelid = format('oncepay.%I', p_table)::regclass and attnum > 0 and not attisdropped;
    truncate pg_temp.staged_changes, pg_temp.staged_slots;
    execute format(
        'insert into pg_temp.staged_slots (slot)
         select slot
         from (select slot, count(*) as n, sum(hashint8extended(hash_record_extended(row(%3$s), 0), 1)) as h, max(lsn) > $2 as past
               from oncepay.%1$I where slot <@ $1 group by slot) o
         full join (select slot, count(*) as n, sum(hashint8extended(hash_record_extended(row(%3$s), 0), 1)) as h
                    from pg_temp.%2$I group by slot) n using (slot)
         where o.past or (o.n, o.h) is distinct from (n.n, n.h)',
        p_table, staged_table, hashed) using p_slots, p_lsn;
    if not exists (select from pg_temp.staged_slots) then
        return 0;
    end if;
    execute format('analyze pg_temp.%I', staged_table);
    analyze pg_temp.staged_slots;
    execute format(
        'insert into pg_temp.staged_changes (old, new)
         select o.ctid, n.ctid
         from (select ctid, * from oncepay.%I where slot <@ $1 and slot in (select slot from pg_temp.staged_slots)) o
         full join (select ctid, * from pg_temp.%I where slot in (select slot from pg_temp.staged_slots)) n using (%s)
         where o.slot is null or n.slot is null or o.lsn > $2 or row(%s) is distinct from row(%s)',
        p_table, staged_table, (select string_agg(quote_ident(k), ', ') from unnest(p_key) k),
        replace(content, 'x.', 'o.'), replace(content, 'x.', 'n.')) using p_slots, p_lsn;
    execute format('select count(*) from oncepay.%I where slot <@ $1 and slot in (select slot from pg_temp.staged_slots)', p_table)
    into had using p_slots;
    execute format('select count(*) from pg_temp.%I where slot in (select slot from pg_temp.staged_slots)', staged_table) into staged;
    select count(distinct old), count(distinct new) into gone, come from pg_temp.staged_changes;
    if gone > 0 then
        execute format('delete from oncepay.%I t using (select distinct old from pg_temp.staged_changes) c where t.ctid = c.old',
                       p_table);
        get diagnostics gone = row_count;
    end if;
    if had - gone + come <> staged then
        -- A row staged twice, which the key refuses now; or twice in a table without a key, or changed meanwhile: all of these slots go.
        execute format('delete from oncepay.%I where slot <@ $1 and slot in (select slot from pg_temp.staged_slots)', p_table)
        using p_slots;
        execute format('insert into oncepay.%I (%s) select %s from pg_temp.%I where slot in (select slot from pg_temp.staged_slots)',
                       p_table, columns, columns, staged_table);
        return had + staged;
    end if;
    if come > 0 then
        execute format(
            'insert into oncepay.%I (%s) select %s from pg_temp.%I n
             where n.ctid in (select new from pg_temp.staged_changes)',
            p_table, columns, columns, staged_table);
    end if;
    return gone + come;
end $$;

-- As in 0013.
create or replace function oncepay.take_rebuild(p_slots int4multirange, p_lsn pg_lsn)
    returns table (of_table text, changed bigint)
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    create temporary table staged_slots (slot integer) on commit drop;
    return query
    select t.name, oncepay.take_staged(t.name, t.key, p_slots, p_lsn)
    from (values ('entry_rows', array['key', 'entry_id']),
                 ('seller_postings', array['key', 'entry_id', 'seller']),
                 ('link_rows', array['balance_transaction', 'key', 'entry_id']),
                 ('payments', array['key'])) t (name, key);

    -- History keeps what it has. A page brings last versions, and so does history, mostly.
    analyze pg_temp.staged_payment_versions;
    return query
    with left_over as materialized (
        select s.* from pg_temp.staged_payment_versions s
        where not exists (select from oncepay.payment_versions v where v.key = s.key and v.last_version = s.last_version)
          and not exists (select from oncepay.payment_history_rows h where h.key = s.key and h.version = s.last_version)
    ), made as (
        insert into oncepay.payment_versions (key, slot, first_version, last_version, versions, shard)
        select s.key, s.slot, s.first_version, s.last_version, s.versions, s.shard
        from left_over s
        where not exists (
            select from oncepay.payment_versions v cross join lateral json_array_elements(v.versions::json) e
            where v.key = s.key and s.last_version between v.first_version and v.last_version
              and (e ->> 0)::bigint = s.last_version offset 0)
        returning 1
    )
    select 'payment_versions', count(*) from made;
end $$;

-- As in 0010, with one question where nothing is to be forgotten.
create or replace function oncepay.forget_versions(p_slots int4multirange) returns void
    language sql volatile security definer set search_path = pg_catalog as $$
    delete from oncepay.payment_history_rows h
    where h.slot <@ p_slots
      and not exists (select from oncepay.payments p where p.key = h.key and p.version >= h.version);
    with past as materialized (
        select v.ctid as place, coalesce(p.version, 0) as version
        from oncepay.payment_versions v left join oncepay.payments p using (key)
        where v.slot <@ p_slots and v.last_version > coalesce(p.version, 0)
    ), forgotten as (
        delete from oncepay.payment_versions v using past where v.ctid = past.place and v.first_version > past.version
    )
    update oncepay.payment_versions v
    set last_version = past.version, versions = (
        select json_agg(e order by n) from json_array_elements(v.versions::json) with ordinality a (e, n)
        where (e ->> 0)::bigint <= past.version)
    from past
    where v.ctid = past.place and v.first_version <= past.version;
$$;

revoke execute on function oncepay.postings_of, oncepay.coded_postings_of, oncepay.check_rebuild, oncepay.derive_postings from public;
grant execute on function oncepay.check_rebuild, oncepay.derive_postings to oncepay_aggregator;
