-- No range leaves a shard while its derived data is rebuilt: the worker that sends its tables has lock (4, 0), for as long as
-- its session lasts. The rebuild would replace what the range's new owner had brought by what was there before.
create or replace function oncepay.fence_range(p_move text, p_epoch bigint, p_first integer, p_last integer, p_lock_ms integer)
    returns integer language plpgsql volatile as $$
declare
    range_first integer;
    gone integer;
begin
    perform oncepay.assert_move(p_move, p_epoch);
    if not pg_try_advisory_xact_lock_shared(4, 0) then
        raise exception 'what the aggregator derives of this shard is being rebuilt: switch when `oncepay shards resnapshot` is over'
            using errcode = 'OP005';
    end if;
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
