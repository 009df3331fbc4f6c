-- Least privilege: each service has a role of its own; only the owner can change the schema, nobody can change an entry.
grant usage on schema oncepay to oncepay_router, oncepay_worker, oncepay_aggregator, oncepay_operator, oncepay_reader;
grant select on all tables in schema oncepay
    to oncepay_router, oncepay_worker, oncepay_aggregator, oncepay_operator, oncepay_reader;
grant insert, update on oncepay.payments to oncepay_router, oncepay_worker;
grant insert on oncepay.entries, oncepay.balance_links to oncepay_router, oncepay_worker;
grant update on oncepay.worker_epoch to oncepay_worker;
revoke execute on all functions in schema oncepay from public;
grant execute on all functions in schema oncepay to oncepay_router, oncepay_worker;
grant execute on function oncepay.slot_of(text), oncepay.sums_to_zero(bigint[])
    to oncepay_aggregator, oncepay_operator, oncepay_reader;
