-- Moving a range of slots to another shard. Advisory lock class 3 = a move (by its name's hash).

-- The operator process that has a move: its epoch is raised at every takeover, and all that a process does to this database for the
-- move compares it, so that one that froze can do nothing more. `copied_to`: the next slot to copy into this shard.
create table oncepay.moves (
    id text primary key,
    epoch bigint not null,
    holder text not null,
    copied_to integer,
    copied_rows bigint not null default 0,
    copied_bytes bigint not null default 0
);

-- One row a stream. Its updates travel in the stream, so that the other side's progress shows that all before them has come.
create table oncepay.move_marks (
    stream text primary key,
    beat bigint not null default 0
);

grant select on oncepay.moves, oncepay.move_marks
    to oncepay_router, oncepay_worker, oncepay_aggregator, oncepay_operator, oncepay_reader, oncepay_mover;

-- OP002: another process has the move. Holds off a takeover until the caller's transaction is through.
create function oncepay.assert_move(p_move text, p_epoch bigint) returns boolean language plpgsql volatile as $$
begin
    perform pg_advisory_xact_lock_shared(3, hashtext(p_move));
    if not exists (select from oncepay.moves where id = p_move and epoch = p_epoch) then
        raise exception 'another process has move %', p_move using errcode = 'OP002';
    end if;
    return true;
end $$;

-- Take a move over: waits out the transactions of the process before.
create function oncepay.claim_move(p_move text, p_epoch bigint, p_holder text, p_streams text[]) returns bigint
    language plpgsql volatile as $$
begin
    perform pg_advisory_xact_lock(3, hashtext(p_move));
    insert into oncepay.moves as m (id, epoch, holder) values (p_move, p_epoch, p_holder)
    on conflict (id) do update set epoch = excluded.epoch, holder = excluded.holder
        where m.epoch < excluded.epoch or (m.epoch = excluded.epoch and m.holder = excluded.holder);
    if not found then
        raise exception 'another process has move %', p_move using errcode = 'OP002';
    end if;
    insert into oncepay.move_marks (stream) select unnest(p_streams) on conflict do nothing;
    perform pg_logical_emit_message(true, 'oncepay', 'move ' || p_move);
    return p_epoch;
end $$;

-- Cut the ranges at `p_first` and behind `p_last`. The owner stays. Returns how many cuts there were.
create function oncepay.split_range(p_move text, p_epoch bigint, p_first integer, p_last integer, p_version bigint, p_lock_ms integer)
    returns integer language plpgsql volatile as $$
declare
    cut integer;
    found_first integer;
    found_last integer;
    cuts integer := 0;
begin
    perform oncepay.assert_move(p_move, p_epoch);
    perform set_config('lock_timeout', p_lock_ms || 'ms', true);
    foreach cut in array array[p_first, p_last + 1] loop
        select first into found_first from oncepay.ranges where first < cut and cut <= last;
        continue when not found;
        perform pg_advisory_xact_lock(1, found_first);
        delete from oncepay.ranges where first = found_first and first < cut and cut <= last returning last into found_last;
        continue when not found;
        insert into oncepay.ranges (first, last, map_version)
        values (found_first, cut - 1, p_version), (cut, found_last, p_version);
        cuts := cuts + 1;
    end loop;
    perform pg_logical_emit_message(true, 'oncepay', 'split ' || p_move);
    return cuts;
end $$;

-- The fence: the slots leave this shard's ranges, under the exclusive lock of each of them, so that no transaction which looked at
-- them before is still under way. Returns how many ranges left; 0 when they had left before.
create function oncepay.fence_range(p_move text, p_epoch bigint, p_first integer, p_last integer, p_lock_ms integer)
    returns integer language plpgsql volatile as $$
declare
    range_first integer;
    gone integer;
begin
    perform oncepay.assert_move(p_move, p_epoch);
    perform set_config('lock_timeout', p_lock_ms || 'ms', true);
    for range_first in
        select first from oncepay.ranges where first <= p_last and last >= p_first order by first
    loop
        perform pg_advisory_xact_lock(1, range_first);
    end loop;
    if exists (select from oncepay.ranges where first <= p_last and last >= p_first and (first < p_first or last > p_last)) then
        raise exception 'slots % to % are no whole ranges here', p_first, p_last using errcode = 'OP004';
    end if;
    delete from oncepay.ranges where first between p_first and p_last;
    get diagnostics gone = row_count;
    perform pg_logical_emit_message(true, 'oncepay', 'fence ' || p_move);
    return gone;
end $$;

-- Take the slots over. With `p_origin` only when that stream has been replayed here up to `p_drain` (OP003 else): the progress is in
-- the log, and so true on any leader. Without, the giver takes back what it had fenced. Returns whether they were taken now.
create function oncepay.take_range(
    p_move text, p_epoch bigint, p_first integer, p_last integer, p_version bigint, p_origin text, p_drain pg_lsn
) returns boolean language plpgsql volatile as $$
declare
    progress pg_lsn;
    taken boolean := false;
begin
    perform oncepay.assert_move(p_move, p_epoch);
    if exists (select from oncepay.ranges where first <= p_last and last >= p_first and (first < p_first or last > p_last)) then
        raise exception 'slots % to % are no whole ranges here', p_first, p_last using errcode = 'OP004';
    end if;
    if not exists (select from oncepay.ranges where first between p_first and p_last) then
        if p_origin is not null then
            progress := pg_replication_origin_progress(p_origin, true);
            if progress is null or progress < p_drain then
                raise exception 'the stream is at %, and not at % yet', progress, p_drain using errcode = 'OP003';
            end if;
        end if;
        insert into oncepay.ranges (first, last, map_version) values (p_first, p_last, p_version);
        taken := true;
    end if;
    perform pg_logical_emit_message(true, 'oncepay', 'take ' || p_move);
    return taken;
end $$;

-- A stream that starts where the copy's log position is brings rows again that the copy has. The rows' later changes follow in the
-- same stream, so it is enough to leave out the insert.
create function oncepay.skip_existing() returns trigger language plpgsql as $$
declare
    known boolean;
begin
    execute tg_argv[0] into known using new;
    return case when known then null else new end;
end $$;

-- Tables that belong to slots: their primary keys lead with (slot, key).
create view oncepay.slot_tables as
select c.oid as relid, c.relname::text as name,
       array(select a.attname::text from unnest(i.indkey::smallint[]) with ordinality k (attnum, n)
             join pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum order by k.n) as key_columns,
       array(select a.attname::text from pg_attribute a
             where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' order by a.attnum) as columns,
       -- who is referred to comes first
       (select count(*) from pg_constraint f where f.conrelid = c.oid and f.contype = 'f' and f.confrelid <> c.oid)::integer as depth
from pg_class c
join pg_namespace s on s.oid = c.relnamespace and s.nspname = 'oncepay'
join pg_index i on i.indrelid = c.oid and i.indisprimary
where c.relkind = 'r'
  and (select a.attname from pg_attribute a where a.attrelid = c.oid and a.attnum = i.indkey[0]) = 'slot';
grant select on oncepay.slot_tables to oncepay_operator, oncepay_reader, oncepay_mover, oncepay_worker;

-- Give every table of slots the trigger for streams that come in, for which only what applies a stream pays, and the grants of a move.
-- Returns how many were new.
create function oncepay.ready_for_streams() returns integer language plpgsql volatile as $$
declare
    item record;
    query text;
    made integer := 0;
begin
    for item in
        select * from oncepay.slot_tables t
        where not exists (select from pg_trigger g where g.tgrelid = t.relid and g.tgname = 'zz_skip_existing')
    loop
        query := format('select exists (select from oncepay.%I t where %s)', item.name,
                        (select string_agg(format('t.%1$I = ($1).%1$I', c), ' and ') from unnest(item.key_columns) c));
        execute format('create trigger zz_skip_existing before insert on oncepay.%I for each row
                        execute function oncepay.skip_existing(%L)', item.name, query);
        execute format('alter table oncepay.%I enable replica trigger zz_skip_existing', item.name);
        execute format('grant select, delete on oncepay.%I to oncepay_mover', item.name);
        made := made + 1;
    end loop;
    return made;
end $$;
select oncepay.ready_for_streams();

-- Rows that were moved away, or copied in vain, are deleted by a role of its own, and by nobody else.
create or replace function oncepay.refuse_change() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' and current_user = 'oncepay_mover' then
        return null;
    end if;
    raise exception '% is append-only: % refused', tg_table_name, tg_op
        using errcode = 'integrity_constraint_violation', constraint = 'append_only';
end $$;

-- Delete at most `p_limit` rows of slots that are not this shard's. Returns how many; 0 when none is left.
create function oncepay.delete_moved(p_move text, p_epoch bigint, p_table text, p_first integer, p_last integer, p_limit integer)
    returns integer language plpgsql volatile as $$
declare
    gone integer;
begin
    perform oncepay.assert_move(p_move, p_epoch);
    if exists (select from oncepay.ranges where first <= p_last and last >= p_first) then
        raise exception 'this shard owns slots of % to %: nothing of them is deleted', p_first, p_last using errcode = 'OP004';
    end if;
    if not exists (select from oncepay.slot_tables where name = p_table) then
        raise exception '% is no table of slots', p_table using errcode = 'OP004';
    end if;
    execute format('delete from oncepay.%1$I where ctid = any (array(
                        select ctid from oncepay.%1$I where slot between $1 and $2 limit $3))', p_table)
    using p_first, p_last, p_limit;
    get diagnostics gone = row_count;
    perform pg_logical_emit_message(true, 'oncepay', 'delete ' || p_move);
    return gone;
end $$;

revoke execute on function oncepay.assert_move, oncepay.claim_move, oncepay.split_range, oncepay.fence_range, oncepay.take_range,
    oncepay.skip_existing, oncepay.ready_for_streams, oncepay.delete_moved from public;
grant usage on schema oncepay to oncepay_mover;
grant select on all tables in schema oncepay to oncepay_mover;
grant execute on function oncepay.assert_move, oncepay.delete_moved, oncepay.slot_of, oncepay.sums_to_zero to oncepay_mover;
