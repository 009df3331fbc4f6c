-- A payment's history in one row for each batch that brought versions of it, in place of one for each version: a backlog has all of
-- a payment's life in one batch. `versions` is a JSON array, oldest first, of [version, status, event, actor, committed at (ms since
-- 1970), position (as a number) or null]. The same version may come twice, as after a move; the view shows it once.
create table oncepay.payment_versions (
    key text not null,
    slot integer not null,
    first_version bigint not null,
    last_version bigint not null,
    versions text not null,
    shard text not null
);
create index payment_versions_key on oncepay.payment_versions (key);

alter table oncepay.payment_history rename to payment_history_rows;
create view oncepay.payment_history as
select distinct on (h.key, h.version) h.key, h.version, h.slot, h.status, h.event, h.actor, h.committed_at, h.shard, h.lsn
from (
    select key, version, slot, status, event, actor, committed_at, shard, lsn from oncepay.payment_history_rows
    union all
    select v.key, (e ->> 0)::bigint, v.slot, e ->> 1, e ->> 2, e ->> 3,
           timestamptz 'epoch' + (e ->> 4)::bigint * interval '1 millisecond', v.shard, pg_lsn '0/0' + (e ->> 5)::numeric
    from oncepay.payment_versions v cross join lateral json_array_elements(v.versions::json) e) h
order by h.key, h.version, h.lsn;

grant select on oncepay.payment_versions, oncepay.payment_history to oncepay_aggregator, oncepay_reader;
grant insert on oncepay.payment_versions to oncepay_aggregator;

-- As in 0004, for both tables.
create or replace function oncepay.forget_versions(p_slots int4multirange) returns void
    language sql volatile security definer set search_path = pg_catalog as $$
    delete from oncepay.payment_history_rows h
    where h.slot <@ p_slots
      and not exists (select from oncepay.payments p where p.key = h.key and p.version >= h.version);
    delete from oncepay.payment_versions v
    where v.slot <@ p_slots
      and not exists (select from oncepay.payments p where p.key = v.key and p.version >= v.first_version);
    update oncepay.payment_versions v
    set last_version = p.version, versions = (
        select json_agg(e order by n) from json_array_elements(v.versions::json) with ordinality a (e, n)
        where (e ->> 0)::bigint <= p.version)
    from oncepay.payments p
    where v.slot <@ p_slots and p.key = v.key and v.last_version > p.version;
$$;
