-- The next page of payouts with open work, as fill.sql for payments.
select slot, key, status, version
from oncepay.payouts p
where open_work and (slot, key) > ($1::integer, $2::text)
  and slot <= $4
  and exists (select from oncepay.ranges r where p.slot between r.first and r.last)
order by slot, key
limit $3
