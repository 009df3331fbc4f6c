-- The next page of payments with open work of some slots, in the order of the partial index payments_open. Not only of
-- oncepay.ranges: a range that is fenced may come back, and no new map tells of that.
-- $1, $2: where the page before ended; $3: rows; $4: the last slot; $5: since when a payment that hasn't changed is old.
select slot, key, status, version, extract(epoch from expires_at)::float8 as expires_s,
       updated_at < clock_timestamp() - $5::interval as is_old
from oncepay.payments
where open_work
  and (slot, key) > ($1::integer, $2::text)
  and slot <= $4
order by slot, key
limit $3
