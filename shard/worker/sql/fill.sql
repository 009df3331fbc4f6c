-- The next page of payments with open work, in the order of the partial index payments_open.
-- $1, $2: where the page before ended; $3: rows.
select slot, key, status, version, extract(epoch from expires_at)::float8 as expires_s
from oncepay.payments
where open_work
  and (slot, key) > ($1::integer, $2::text)
order by slot, key
limit $3
