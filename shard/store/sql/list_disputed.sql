-- A page of payments with disputes, newest first, before ($1, $2); at most $3.
select slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, intent, fingerprint,
       coalesce(agreed, terms::text) as terms, coalesce(course, progress::text) as progress, created_at, updated_at, expires_at, false as passed
from oncepay.payments p
where exists (select from oncepay.ranges r where p.slot between r.first and r.last)  -- no copy of a move
  and disputed and (created_at, key collate "C") < ($1::timestamptz, $2::text)
order by created_at desc, key collate "C" desc
limit $3
