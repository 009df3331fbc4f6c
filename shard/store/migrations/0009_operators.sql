-- Least privilege for who works on a shard by hand or by command. Roles are made before migrations are applied.
--   operator  sees all statistics, and may ask for a checkpoint; it writes nothing
--   backup    reads the data directory over the replication protocol, ends a segment of the log, names a point to restore to
--   mover     reads all, copies by logical replication; what it may write comes with the functions that move ranges
grant pg_monitor, pg_checkpoint to oncepay_operator;

grant execute on function pg_switch_wal(), pg_create_restore_point(text) to oncepay_backup;

grant pg_create_subscription to oncepay_mover;
grant usage on schema oncepay to oncepay_mover;
grant select on all tables in schema oncepay to oncepay_mover;
grant execute on function oncepay.slot_of(text), oncepay.sums_to_zero(bigint[]) to oncepay_mover;
