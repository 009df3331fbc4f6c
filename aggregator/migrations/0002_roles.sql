-- The aggregator writes its tables and can't change the schema; entries and links are never changed or deleted by it.
grant usage on schema oncepay to oncepay_aggregator, oncepay_reader;
grant select on all tables in schema oncepay to oncepay_aggregator, oncepay_reader;
grant insert, update on oncepay.watermarks, oncepay.payments, oncepay.seller_days, oncepay.account_totals, oncepay.kind_totals
    to oncepay_aggregator;
grant insert on oncepay.entries, oncepay.balance_links to oncepay_aggregator;
