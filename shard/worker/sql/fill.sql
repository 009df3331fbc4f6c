-- The next page of payments with open work of slots that are this shard's, in the order of the partial index payments_open.
-- $1, $2: where the page before ended; $3: rows; $4: the last slot.
select slot, key, status, version, extract(epoch from expires_at)::float8 as expires_s
from oncepay.payments p
where open_work
  and (slot, key) > ($1::integer, $2::text)
  and slot <= $4
  and exists (select from oncepay.ranges r where p.slot between r.first and r.last)
order by slot, key
limit $3
