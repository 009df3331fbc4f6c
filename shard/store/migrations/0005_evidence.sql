-- The evidence counts only a member that the quorum counts now (`synchronous_standby_names`): another may have flushed a commit
-- whose wait was cut off, and yet have no say in who is elected next. See 0002 for the rest.
create or replace function oncepay.evidence(members text[], since text) returns table (at_lsn text, proved boolean)
    language plpgsql volatile security definer set search_path = pg_catalog as $$
declare
    wanted constant pg_lsn := coalesce(since::pg_lsn, pg_current_wal_flush_lsn());
begin
    return query select wanted::text, exists (
        select from pg_stat_get_wal_senders() w
        join pg_get_replication_slots() s on s.active_pid = w.pid
        where s.slot_type = 'physical' and s.slot_name = any (members)
          and w.sync_state in ('quorum', 'sync') and w.flush_lsn >= wanted);
end $$;
