-- Makes a database that was restored from a backup a new incarnation that owns nothing, before anybody can reach it.
-- The names in braces are what it becomes, quoted. What it was is kept in oncepay_meta.restored.

create table if not exists oncepay_meta.restored (
    at timestamptz not null default now(),
    of_shard text not null,
    of_incarnation text not null,
    -- the ranges that the shard owned at the moment that was restored: [[first, last], …]
    ranges jsonb not null,
    -- the last commit that was restored
    up_to timestamptz
);
grant select on oncepay_meta.restored to public;
insert into oncepay_meta.restored (of_shard, of_incarnation, ranges, up_to)
select i.shard, i.incarnation,
       (select coalesce(jsonb_agg(jsonb_build_array(first, last) order by first), '[]') from oncepay.ranges),
       (select max(updated_at) from oncepay.payments)
from oncepay.identity i;

-- The ranges belong to whoever has them now.
delete from oncepay.ranges;
update oncepay.identity set shard = {shard}, incarnation = {incarnation};
-- Whoever worked for the original is nobody here.
update oncepay.worker_epoch set epoch = epoch + 1, holder = '';

-- The aggregator has nothing of the new incarnation's feed. (A backup may be of before the column.)
do $$
begin
    if exists (select from pg_attribute where attrelid = 'oncepay.worker_epoch'::regclass and attname = 'fed') then
        update oncepay.worker_epoch set fed = false;
    end if;
end $$;

-- Subscriptions of moves would read the original's slots on: they go, and the slots are left alone.
do $$
declare
    name text;
begin
    for name in select subname from pg_subscription where subdbid = (select oid from pg_database where datname = current_database())
    loop
        execute format('alter subscription %I disable', name);
        execute format('alter subscription %I set (slot_name = none)', name);
        execute format('drop subscription %I', name);
    end loop;
end $$;
