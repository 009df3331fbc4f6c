-- A vacuum of payments reads all of its indexes, and an analyze a sample of one size: done at each hundredth of a large table that was a
-- good part of what a payment cost Postgres there. Farther apart on a larger table, they cost each payment the same; the dead versions
-- that wait take up to a twentieth of it.
alter table oncepay.payments set (
    autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.1, autovacuum_vacuum_insert_threshold = 10000,
    autovacuum_analyze_scale_factor = 0.1, autovacuum_analyze_threshold = 5000);
alter table oncepay.entries set (autovacuum_analyze_scale_factor = 0.1);
alter table oncepay.balance_links set (autovacuum_analyze_scale_factor = 0.1);
