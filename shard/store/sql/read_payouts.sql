-- The payouts with the keys $2 (their slots $1), one row a key in that order: whether this shard owns the slot, the payout where
-- there is one, and with $3 its entries, oldest first.
select exists (select from oncepay.ranges r where u.slot between r.first and r.last) as owned,
       case when p.key is not null then oncepay.payout_json(p)::text end as payout,
       case when $3 and p.key is not null then (
           select jsonb_agg(jsonb_build_object(
               'entry_id', e.entry_id, 'kind', e.kind, 'currency', e.currency, 'source', e.source,
               'accounts', e.accounts, 'amounts', e.amounts, 'sellers', e.sellers) order by e.created_at, e.entry_id)::text
           from oncepay.entries e where e.slot = p.slot and e.key = p.key) end as entries
from unnest($1::integer[], $2::text[]) with ordinality u (slot, key, n)
left join oncepay.payouts p on p.slot = u.slot and p.key = u.key
order by u.n
