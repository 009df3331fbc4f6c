-- What a move leaves behind goes page by page where much of a table goes: rows that are slots' neighbours are no neighbours in the table,
-- so that by slots each page is written many times, and after a checkpoint goes into the log whole for a row or two.
create function oncepay.delete_moved_pages(
    p_move text, p_epoch bigint, p_table text, p_first integer, p_last integer, p_page bigint, p_until bigint
) returns integer language plpgsql volatile as $$
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
    execute format('delete from oncepay.%1$I where ctid >= $1 and ctid < $2 and slot between $3 and $4', p_table)
    using format('(%s,0)', p_page)::tid, format('(%s,0)', p_until)::tid, p_first, p_last;
    get diagnostics gone = row_count;
    if gone > 0 then
        perform pg_logical_emit_message(true, 'oncepay', 'delete ' || p_move);
    end if;
    return gone;
end $$;
revoke execute on function oncepay.delete_moved_pages from public;
grant execute on function oncepay.delete_moved_pages to oncepay_mover;
