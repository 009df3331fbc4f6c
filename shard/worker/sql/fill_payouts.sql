-- The next page of payouts with open work, as fill.sql for payments.
select slot, key, status, version
from oncepay.payouts
where open_work and (slot, key) > ($1::integer, $2::text)
  and slot <= $4
order by slot, key
limit $3
