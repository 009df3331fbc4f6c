-- A vacuum of payments reads all of its indexes, and an analyze a sample of one size: done at each hundredth of a large table that was
-- half of what a payment cost Postgres there. By tenths it stays the same for each payment, however many there are; the
-- dead versions that wait take up to a tenth of the table.
alter table oncepay.payments set (
    autovacuum_vacuum_scale_factor = 0.1, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.1, autovacuum_vacuum_insert_threshold = 10000,
    autovacuum_analyze_scale_factor = 0.1, autovacuum_analyze_threshold = 5000);
alter table oncepay.entries set (autovacuum_analyze_scale_factor = 0.1);
alter table oncepay.balance_links set (autovacuum_analyze_scale_factor = 0.1);
