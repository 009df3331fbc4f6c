-- name: insert
insert into oncepay.payments (slot, key, status, version, buyer, currency, amount, fingerprint, agreed, course, open_work, event,
    actor, created_at, updated_at, expires_at)
select oncepay.slot_of('opk_' || g), 'opk_' || g, 'created', 1, 'buyer-' || g % 1000, 'usd', 1000, '\x01',
       '[[["ada",1000]],[100],"2026-10-28.endive"]', '[]', true, 'accepted', 'router-1', now(), now(), now() + interval '1 day'
from generate_series($1::integer, $2::integer) g

-- name: update
update oncepay.payments set version = version + 1, updated_at = now()
where (slot, key) in (select oncepay.slot_of('opk_' || g), 'opk_' || g from generate_series($1::integer, $2::integer) g)
