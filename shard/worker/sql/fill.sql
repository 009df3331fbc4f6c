-- The next page of payments with open work, in the order of the partial index payments_open (its condition stands here word
-- for word, so that the index serves). $1, $2: where the page before ended; $3: rows.
select slot, key, status, version, extract(epoch from expires_at)::float8 as expires_s
from oncepay.payments
where (status not in ('succeeded', 'failed', 'canceled') or (status = 'succeeded' and progress ->> 'stripe_fee' is null))
  and (slot, key) > ($1::integer, $2::text)
order by slot, key
limit $3
