-- Outside of a transaction, each statement by itself: a large shard goes on taking payments while its indexes are made.
-- Lists walk by the time alone and sort the few payments of one moment; what no query asks is not indexed.
create index concurrently if not exists payments_created_at on oncepay.payments (created_at);
create index concurrently if not exists payments_buyer_at on oncepay.payments (buyer, created_at);
drop index concurrently if exists oncepay.payments_created;
drop index concurrently if exists oncepay.payments_buyer;
drop index concurrently if exists oncepay.balance_links_transaction;
