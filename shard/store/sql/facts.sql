-- What an operator wants to know of a shard, as one JSON object, from its leader. Sizes and distances in bytes.
select jsonb_build_object(
    'shard', (select shard from oncepay.identity),
    'incarnation', (select incarnation from oncepay.identity),
    'migration', (select max(number) from oncepay_meta.migrations),
    'ranges', (select coalesce(jsonb_agg(jsonb_build_array(first, last) order by first), '[]') from oncepay.ranges),
    'map_version', (select max(map_version) from oncepay.ranges),
    'worker_epoch', (select epoch from oncepay.worker_epoch),
    'flushed', (pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::bigint,
    'in_recovery', pg_is_in_recovery(),
    'database_bytes', pg_database_size(current_database()),
    'payments_estimate', (select greatest(reltuples, 0)::bigint from pg_class where oid = 'oncepay.payments'::regclass),
    'synchronous_standby_names', current_setting('synchronous_standby_names'),
    'slot_wal_limit_bytes', (select setting::bigint * 1024 * 1024 from pg_settings where name = 'max_slot_wal_keep_size'),
    'standbys', (
        select coalesce(jsonb_agg(jsonb_build_object(
            'node', application_name, 'state', state, 'sync_state', sync_state,
            'behind_bytes', greatest(pg_current_wal_flush_lsn() - flush_lsn, 0)::bigint) order by application_name), '[]')
        from pg_stat_replication
        where pid in (select active_pid from pg_replication_slots where slot_type = 'physical')),
    'slots', (
        select coalesce(jsonb_agg(jsonb_build_object(
            'slot', slot_name, 'type', slot_type, 'active', active, 'wal_status', wal_status,
            'confirmed', (confirmed_flush_lsn - '0/0'::pg_lsn)::bigint,
            'kept_bytes', greatest(pg_current_wal_lsn() - restart_lsn, 0)::bigint) order by slot_name), '[]')
        from pg_replication_slots),
    'archive', (
        select jsonb_build_object(
            'mode', current_setting('archive_mode'), 'archived', archived_count, 'last', last_archived_wal,
            'last_at', last_archived_time, 'failed', failed_count, 'failing', last_failed_time > coalesce(last_archived_time, '-infinity'),
            'last_failed', last_failed_wal)
        from pg_stat_archiver),
    'longest_transaction_s', (
        select coalesce(max(extract(epoch from clock_timestamp() - xact_start)), 0)::float8 from pg_stat_activity
        where backend_type = 'client backend' and pid <> pg_backend_pid())
)::text
