-- Where this shard's log and clock are: whatever was committed before this is read is not past `lsn`.
select pg_current_wal_insert_lsn() as lsn, clock_timestamp() as now
