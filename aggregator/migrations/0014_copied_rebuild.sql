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

-- So of accounts that are codes. A third faster with three sums than with one for each column.
create function oncepay.coded_postings_of(accounts text[], amounts bigint[])
    returns table (seller text, amount bigint, total bigint, fee bigint, debit bigint, credit bigint, named boolean)
    language sql immutable parallel safe as $$
    select s.seller, case when s.seller = 'platform' then -s.total else -coalesce(s.own, 0) end, -s.total,
           case when s.seller = 'platform' then 0 else coalesce(s.own, 0) - s.total end, s.debit, s.debit - s.own, true
    from (
        select substr(u.code, 2) as seller, sum(u.amount)::bigint as total, sum(u.amount) filter (where u.code ^@ 'P')::bigint as own,
               sum(greatest(u.amount, 0)) filter (where u.code ^@ 'P')::bigint as debit
        from unnest(accounts, amounts) u (code, amount)
        where (u.code ^@ 'P' or u.code ^@ 'F') and u.code <> 'F'
        group by 1) s
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

-- The query that makes the postings of the entries in `p_entries` (a table, as `e`) for which `p_which` holds. Its columns are those of
-- seller_postings, by name.
create function oncepay.postings_query(p_entries text, p_which text) returns text
    language sql immutable set search_path = pg_catalog, pg_temp
    return format(
        'select b.seller, e.currency, e.created_at, e.key, e.entry_id, e.slot, e.kind, b.amount, b.total, b.fee, e.shard, e.lsn, b.debit,
                b.credit, b.named
         from %1$s e cross join lateral oncepay.coded_postings_of(e.accounts, e.amounts) b
         where e.sellers is null and %2$s
         union all
         select b.seller, e.currency, e.created_at, e.key, e.entry_id, e.slot, e.kind, b.amount, b.total, b.fee, e.shard, e.lsn, b.debit,
                b.credit, b.named
         from %1$s e cross join lateral oncepay.postings_of(e.accounts, e.amounts, e.sellers) b
         where e.sellers is not null and %2$s', p_entries, p_which);

-- Puts the postings of all entries in the slots, in the order of the table's index.
create function oncepay.derive_postings(p_slots int4multirange) returns void
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    execute 'insert into oncepay.seller_postings (seller, currency, created_at, key, entry_id, slot, kind, amount, total, fee, shard, lsn,
                                                  debit, credit, named) '
        || oncepay.postings_query('oncepay.entry_rows', 'e.slot <@ $1') || ' order by seller, currency, created_at' using p_slots;
end $$;

-- As in 0013; the postings are made of the staged entries. First both sides' rows are hashed, by slot of 64 in a row (`bucket`): what has
-- the same number of rows and the same sum of hashes is the same. A row's hash is hashed once more, for the sum of records' hashes
-- doesn't tell two rows from the same two with a value exchanged; as a text, for a number's hash has 32 bits. For the same reason numbers
-- are also added up, or hashed as a text where there are several.
create or replace function oncepay.take_staged(p_table text, p_key text[], p_slots int4multirange, p_lsn pg_lsn) returns bigint
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    differ constant text := 'slot >> 6 in (select bucket from pg_temp.staged_buckets)';
    derived constant boolean := p_table = 'seller_postings';
    kept constant text := format('oncepay.%I', p_table);
    staged constant text := format('pg_temp.%I', 'staged_' || p_table);
    columns text;
    hashes text;
    content text;
    had bigint;
    came bigint;
    gone bigint;
    come bigint;
begin
    select string_agg(quote_ident(attname), ', ' order by attnum),
           format('count(*) as n, sum(hashtextextended(hash_record_extended(row(%s), 0)::text, 0)) as h, array[%s]::numeric[] as s',
                  string_agg(quote_ident(attname) || case atttypid when 'bigint[]'::regtype then '::text' else '' end, ', '
                             order by attnum) filter (where attname <> 'lsn'),
                  string_agg(format('sum(%I)', attname), ', ' order by attnum) filter (where atttypid = 'bigint'::regtype)),
           string_agg('x.' || quote_ident(attname), ', ' order by attnum) filter (where attname <> 'lsn' and attname <> all (p_key))
    into columns, hashes, content
    from pg_catalog.pg_attribute
    where attrelid = kept::regclass and attnum > 0 and not attisdropped;
    truncate pg_temp.staged_changes, pg_temp.staged_buckets;
    execute format(
        'insert into pg_temp.staged_buckets (bucket)
         select bucket
         from (select slot >> 6 as bucket, %3$s, max(lsn) > $2 as past from %1$s where slot <@ $1 group by 1) o
         full join (select slot >> 6 as bucket, %3$s from %2$s x group by 1) n using (bucket)
         where o.past or (o.n, o.h, o.s) is distinct from (n.n, n.h, n.s)',
        kept, case when derived then '(' || oncepay.postings_query('pg_temp.staged_entry_rows', 'true') || ')' else staged end, hashes)
    using p_slots, p_lsn;
    if not exists (select from pg_temp.staged_buckets) then
        return 0;
    end if;
    analyze pg_temp.staged_buckets;
    if derived then
        execute format('insert into %1$s (%2$s) select %2$s from (%3$s) x', staged, columns,
                       oncepay.postings_query('pg_temp.staged_entry_rows', 'e.' || differ));
    end if;
    execute 'analyze ' || staged;
    execute format(
        'insert into pg_temp.staged_changes (old, new)
         select o.ctid, n.ctid
         from (select ctid, * from %1$s where slot <@ $1 and %2$s) o full join (select ctid, * from %3$s where %2$s) n using (%4$s)
         where o.slot is null or n.slot is null or o.lsn > $2 or row(%5$s) is distinct from row(%6$s)',
        kept, differ, staged, (select string_agg(quote_ident(k), ', ') from unnest(p_key) k),
        replace(content, 'x.', 'o.'), replace(content, 'x.', 'n.')) using p_slots, p_lsn;
    execute format('select count(*) from %s where slot <@ $1 and %s', kept, differ) into had using p_slots;
    execute format('select count(*) from %s where %s', staged, differ) into came;
    select count(distinct old), count(distinct new) into gone, come from pg_temp.staged_changes;
    if gone > 0 then
        execute format('delete from %s t using (select distinct old from pg_temp.staged_changes) c where t.ctid = c.old', kept);
        get diagnostics gone = row_count;
    end if;
    if had - gone + come <> came then
        -- A row staged twice, which the key refuses now; or twice in a table without a key, or changed meanwhile: all of these go.
        execute format('delete from %s where slot <@ $1 and %s', kept, differ) using p_slots;
        execute format('insert into %1$s (%2$s) select %2$s from %3$s where %4$s', kept, columns, staged, differ);
        return had + came;
    end if;
    if come > 0 then
        execute format('insert into %1$s (%2$s) select %2$s from %3$s n where n.ctid in (select new from pg_temp.staged_changes)',
                       kept, columns, staged);
    end if;
    return gone + come;
end $$;

-- As in 0013, in two parts: the ledger comes first.
drop function oncepay.take_rebuild;
create function oncepay.take_ledger(p_slots int4multirange, p_lsn pg_lsn) returns table (of_table text, changed bigint)
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    create temporary table staged_buckets (bucket integer) on commit drop;
    return query
    select t.name, oncepay.take_staged(t.name, t.key, p_slots, p_lsn)
    from (values ('entry_rows', array['key', 'entry_id']),
                 ('seller_postings', array['key', 'entry_id', 'seller']),
                 ('link_rows', array['balance_transaction', 'key', 'entry_id'])) t (name, key);
end $$;

create function oncepay.take_payments(p_slots int4multirange, p_lsn pg_lsn) returns table (of_table text, changed bigint)
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    return query select 'payments', oncepay.take_staged('payments', array['key'], p_slots, p_lsn);

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

-- As in 0013. Without rows of before 0011 the entries aren't gone through for them.
create or replace function oncepay.settle_postings(p_shards text[], p_shard text, p_lsn pg_lsn) returns void
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    update oncepay.seller_postings set lsn = '0/0' where shard = p_shard and lsn > p_lsn;
    if exists (select from oncepay.seller_postings where shard is null) then
        update oncepay.seller_postings s
        set shard = e.shard, lsn = '0/0', debit = a.debit, credit = a.credit, named = a.named
        from oncepay.entries e cross join lateral oncepay.postings_of(e.accounts, e.amounts, e.sellers) a
        where s.shard is null and e.shard = any (p_shards) and e.key = s.key and e.entry_id = s.entry_id and a.seller = s.seller;
    end if;
end $$;

revoke execute on function oncepay.postings_of, oncepay.coded_postings_of, oncepay.check_rebuild, oncepay.postings_query,
    oncepay.derive_postings from public;
revoke execute on function oncepay.take_ledger, oncepay.take_payments from public;
grant execute on function oncepay.check_rebuild, oncepay.derive_postings, oncepay.take_ledger, oncepay.take_payments to oncepay_aggregator;

-- What these functions find in pg_temp is what they made: nobody else makes temporary objects here.
do $$ begin execute format('revoke temporary on database %I from public', current_database()); end $$;
