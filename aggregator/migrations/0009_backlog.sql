-- What makes applying a backlog cheap. A posting is made with its entry, whose key makes it the only one, so that an index of
-- three columns does for the seller's statement; the rest of its order is sorted within a moment.
alter table oncepay.seller_postings drop constraint seller_postings_pkey;
create index seller_postings_of_seller on oncepay.seller_postings (seller, currency, created_at);
