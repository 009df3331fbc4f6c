-- Two moves that cut one range at once: the second waited for the range's lock, found the range cut otherwise, and left its own cut out.
-- It looks again now.
create or replace function oncepay.split_range(p_move text, p_epoch bigint, p_first integer, p_last integer, p_version bigint, p_lock_ms integer)
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
        loop
            select first into found_first from oncepay.ranges where first < cut and cut <= last;
            exit when not found;
            perform pg_advisory_xact_lock(1, found_first);
            delete from oncepay.ranges where first = found_first and first < cut and cut <= last returning last into found_last;
            continue when not found;
            insert into oncepay.ranges (first, last, map_version)
            values (found_first, cut - 1, p_version), (cut, found_last, p_version);
            cuts := cuts + 1;
            exit;
        end loop;
    end loop;
    perform pg_logical_emit_message(true, 'oncepay', 'split ' || p_move);
    return cuts;
end $$;

-- A giver that has all of the slots takes nothing back, also where they are no whole ranges: a move that was never fenced there can end.
create or replace function oncepay.take_range(
    p_move text, p_epoch bigint, p_first integer, p_last integer, p_version bigint, p_origin text, p_drain pg_lsn
) returns boolean language plpgsql volatile as $$
declare
    progress pg_lsn;
    taken boolean := false;
begin
    perform oncepay.assert_move(p_move, p_epoch);
    if p_origin is null and p_last - p_first + 1 = (
        select sum(least(last, p_last) - greatest(first, p_first) + 1) from oncepay.ranges where first <= p_last and last >= p_first
    ) then
        perform pg_logical_emit_message(true, 'oncepay', 'take ' || p_move);
        return false;
    end if;
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
