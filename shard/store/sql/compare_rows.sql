-- A page of what identifies the state of payments, in the order of the primary key.
-- $1, $2: where the page before ended; $3: the last slot wanted; $4: rows.
select slot, key, status, version, intent
from oncepay.payments
where (slot, key) > ($1::integer, $2::text) and slot <= $3
order by slot, key
limit $4
