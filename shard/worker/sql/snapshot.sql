-- What of a shard's tables the aggregator derives from, read whole in one snapshot for a rebuild.

-- name: ranges
select first, last from oncepay.ranges order by first

-- name: expected
-- How many rows there will be, about: for a progress bar.
select coalesce(sum(greatest(reltuples, 0)), 0)::bigint from pg_class
where oid in ('oncepay.payments'::regclass, 'oncepay.entries'::regclass, 'oncepay.balance_links'::regclass,
              'oncepay.payouts'::regclass)

-- name: payments
select slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, intent, coalesce(agreed, terms::text),
       coalesce(course, progress::text),
       (extract(epoch from created_at) * 1000000)::bigint, (extract(epoch from updated_at) * 1000000)::bigint,
       (extract(epoch from expires_at) * 1000000)::bigint, open_work, event, actor
from oncepay.payments p where exists (select from oncepay.ranges r where p.slot between r.first and r.last)

-- name: entries
select slot, key, entry_id, kind, currency, source, accounts, amounts, sellers, balance_transaction, fee,
       (extract(epoch from created_at) * 1000000)::bigint as created_at
from oncepay.entries e where exists (select from oncepay.ranges r where e.slot between r.first and r.last)

-- name: links
select slot, key, entry_id, balance_transaction, (extract(epoch from created_at) * 1000000)::bigint
from oncepay.balance_links l where exists (select from oncepay.ranges r where l.slot between r.first and r.last)

-- name: payouts
select slot, key, seller, currency, sequence, status, version, amount, payee, ref_code, run, created_by, positions::text,
       progress::text, open_work, (extract(epoch from created_at) * 1000000)::bigint, (extract(epoch from updated_at) * 1000000)::bigint
from oncepay.payouts p where exists (select from oncepay.ranges r where p.slot between r.first and r.last)
