-- Payments with a dispute that is still open, of the slots that this shard owns; at most $1. Each row has the ranges that it owns in this
-- very snapshot, as [first, last]; without such a payment there is one row with these alone.
select o.owned, p.slot, p.key, p.status, p.version, p.buyer, p.currency, p.amount, p.amount_captured, p.amount_refunded, p.intent,
       p.fingerprint, coalesce(p.agreed, p.terms::text) as terms, coalesce(p.course, p.progress::text) as progress,
       p.created_at, p.updated_at, p.expires_at
from (select coalesce(array_agg(array[r.first, r.last]), '{}') as owned from oncepay.ranges r) o
left join lateral (
    select * from oncepay.payments p
    where p.disputed and p.open_work and exists (select from oncepay.ranges r where p.slot between r.first and r.last)
    order by p.created_at, p.key collate "C"
    limit $1) p on true
