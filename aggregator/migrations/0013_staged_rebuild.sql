-- A rebuild brings its rows to tables of its own transaction first, and then takes over what differs: nearly always nothing. Rows
-- that stay as they are cost no write, no index entry and no dead row.

-- What stays of a rebuild's sums is made again by its caller; returns the shards whose sums are forgotten: the rebuilt one, and those
-- that had brought entries of its slots. Their batches wait from here on.
create function oncepay.forget_sums(p_shard text, p_slots int4multirange) returns setof text
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    affected text[];
begin
    affected := array(
        select p_shard union select distinct shard from oncepay.entry_rows where slot <@ p_slots order by 1);
    perform from oncepay.watermarks where shard = any (affected) order by shard for update;
    delete from oncepay.seller_days where shard = any (affected);
    delete from oncepay.account_totals where shard = any (affected);
    delete from oncepay.account_days where shard = any (affected);
    delete from oncepay.kind_totals where shard = any (affected);
    update oncepay.watermarks set open_since = null, open_postings = 0, open_of_one = 0
    where shard = any (affected) and open_since is not null;
    return query select unnest(affected);
end $$;

-- Makes the tables that a rebuild's rows come to, `pg_temp.staged_…`. They are the owner's, so that nobody can put something else in
-- their place, and gone at the transaction's end. `pg_temp` is last in these functions' paths: else it would be the first.
create function oncepay.stage_rebuild() returns void
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    of_table text;
begin
    foreach of_table in array array['entry_rows', 'link_rows', 'seller_postings', 'payments', 'payment_versions'] loop
        execute format('create temporary table %1$I (like oncepay.%2$I) on commit drop', 'staged_' || of_table, of_table);
        execute format('grant insert on pg_temp.%I to oncepay_aggregator', 'staged_' || of_table);
    end loop;
    create temporary table staged_changes (old tid, new tid) on commit drop;
end $$;

-- Makes the rows of p_table in the slots those that are staged, and returns how many were written or deleted. `p_key` names one
-- row. A row stays when all is equal but its position, and that one isn't past p_lsn. Raises unique_violation for a row staged twice.
create function oncepay.take_staged(p_table text, p_key text[], p_slots int4multirange, p_lsn pg_lsn) returns bigint
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    columns text;
    content text;
    had bigint;
    staged bigint;
    gone bigint;
    come bigint;
begin
    select string_agg(quote_ident(attname), ', ' order by attnum),
           string_agg('x.' || quote_ident(attname), ', ' order by attnum) filter (where attname <> 'lsn' and attname <> all (p_key))
    into columns, content
    from pg_catalog.pg_attribute
    where attrelid = format('oncepay.%I', p_table)::regclass and attnum > 0 and not attisdropped;
    execute format('analyze pg_temp.%I', 'staged_' || p_table);
    truncate pg_temp.staged_changes;
    execute format(
        'insert into pg_temp.staged_changes (old, new)
         select o.ctid, n.ctid
         from (select ctid, * from oncepay.%I where slot <@ $1) o full join pg_temp.%I n using (%s)
         where o.slot is null or n.slot is null or o.lsn > $2 or row(%s) is distinct from row(%s)',
        p_table, 'staged_' || p_table, (select string_agg(quote_ident(k), ', ') from unnest(p_key) k),
        replace(content, 'x.', 'o.'), replace(content, 'x.', 'n.')) using p_slots, p_lsn;
    execute format('select count(*) from oncepay.%I where slot <@ $1', p_table) into had using p_slots;
    execute format('select count(*) from pg_temp.%I', 'staged_' || p_table) into staged;
    select count(distinct old), count(distinct new) into gone, come from pg_temp.staged_changes;
    if gone > 0 then
        execute format('delete from oncepay.%I t using (select distinct old from pg_temp.staged_changes) c where t.ctid = c.old',
                       p_table);
        get diagnostics gone = row_count;
    end if;
    if had - gone + come <> staged then
        -- A row staged twice, which the key refuses now; or twice in a table without a key, or changed meanwhile: all goes.
        execute format('delete from oncepay.%I where slot <@ $1', p_table) using p_slots;
        execute format('insert into oncepay.%I (%s) select %s from pg_temp.%I', p_table, columns, columns, 'staged_' || p_table);
        return had + staged;
    end if;
    if come > 0 then
        execute format(
            'insert into oncepay.%I (%s) select %s from pg_temp.%I n
             where n.ctid in (select new from pg_temp.staged_changes)',
            p_table, columns, columns, 'staged_' || p_table);
    end if;
    return gone + come;
end $$;

-- Takes over all that is staged of the slots, as at p_lsn. Returns, for each table, how many rows were written or deleted.
create function oncepay.take_rebuild(p_slots int4multirange, p_lsn pg_lsn)
    returns table (of_table text, changed bigint)
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
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

-- Postings that a rebuild leaves where they are, but whose positions are of a log that the shard no longer has.
create function oncepay.settle_postings(p_shards text[], p_shard text, p_lsn pg_lsn) returns void
    language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    update oncepay.seller_postings set lsn = '0/0' where shard = p_shard and lsn > p_lsn;
    -- As in 0012, of postings that had no shard yet.
    update oncepay.seller_postings s
    set shard = e.shard, lsn = '0/0', debit = a.debit, credit = a.credit, named = a.named
    from oncepay.entry_rows e
    cross join lateral (
        select n.name,
               sum(greatest(p.amount, 0)) filter (where p.account = 'seller:' || n.name || ':payable')::bigint as debit,
               sum(greatest(-p.amount, 0)) filter (where p.account = 'seller:' || n.name || ':payable')::bigint as credit,
               bool_or(p.seller = n.name) as named
        from unnest(e.accounts, e.amounts, e.sellers) p (account, amount, seller)
        cross join lateral (
            select distinct x.name from (values (p.seller), (case when p.account like 'seller:%:payable'
                                                                  then substr(p.account, 8, length(p.account) - 15) end)) x (name)
            where x.name <> '') n
        group by n.name) a
    where s.shard is null and e.shard = any (p_shards) and e.key = s.key and e.entry_id = s.entry_id and a.name = s.seller;
end $$;

revoke execute on function oncepay.forget_sums, oncepay.stage_rebuild, oncepay.take_staged, oncepay.take_rebuild,
    oncepay.settle_postings from public;
grant execute on function oncepay.forget_sums, oncepay.stage_rebuild, oncepay.take_rebuild, oncepay.settle_postings
    to oncepay_aggregator;
