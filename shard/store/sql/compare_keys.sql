-- The same of certain payments. $1, $2: their slots and keys.
select p.slot, p.key, p.status, p.version, p.intent
from unnest($1::integer[], $2::text[]) u (slot, key)
join oncepay.payments p on p.slot = u.slot and p.key = u.key
