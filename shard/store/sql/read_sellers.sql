-- The sellers with the keys $2 (their slots $1), one row a key in that order: whether this shard owns the slot, and the seller
-- where there is one.
select exists (select from oncepay.ranges r where u.slot between r.first and r.last) as owned,
       s.key, s.payee, s.currency, s.basis_points, s.fixed_minor, s.version, s.created_at, s.updated_at
from unnest($1::integer[], $2::text[]) with ordinality u (slot, key, n)
left join oncepay.sellers s on s.slot = u.slot and s.key = u.key
order by u.n
