-- The payout with the reference code $1, if this shard owns it.
select oncepay.payout_json(p)::text as payout
from oncepay.payouts p
where p.ref_code = $1 and exists (select from oncepay.ranges r where p.slot between r.first and r.last)
