-- Vacuum by what has changed, not by a fifth of the table: of ten million payments that would be two million dead versions first.
-- A payment's row has three versions within seconds and then stays; entries and links only grow, and are vacuumed for the sake of
-- the visibility map and of freezing, in small portions.
alter table oncepay.payments set (
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_vacuum_insert_threshold = 10000,
    autovacuum_analyze_scale_factor = 0.02, autovacuum_analyze_threshold = 5000);
alter table oncepay.entries set (
    autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_vacuum_insert_threshold = 20000,
    autovacuum_analyze_scale_factor = 0.02, autovacuum_analyze_threshold = 10000);
alter table oncepay.balance_links set (
    autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_vacuum_insert_threshold = 20000,
    autovacuum_analyze_scale_factor = 0.02, autovacuum_analyze_threshold = 10000);
