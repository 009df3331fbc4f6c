-- What the checker reads of a shard, in one REPEATABLE READ transaction.

-- name: ranges
select first, last from oncepay.ranges order by first

-- name: payments
select slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, coalesce(intent, ''),
       terms::text, coalesce(progress ->> 'charge', ''), progress ->> 'stripe_fee' is not null, expires_at < now(),
       progress -> 'capture' ->> 'shares'
from oncepay.payments

-- name: entries
select slot, key, entry_id, kind, currency, source, accounts, amounts, sellers,
       (extract(epoch from created_at) * 1000000)::bigint
from oncepay.entries

-- name: links
select balance_transaction, key, entry_id from oncepay.balance_links

-- name: payouts
select slot, key, seller, currency, sequence, status, version, amount, ref_code, coalesce((progress ->> 'fee')::bigint, 0),
       coalesce(progress ->> 'reference', ''), (extract(epoch from created_at) * 1000000)::bigint
from oncepay.payouts

-- name: counts
-- Served by the partial index on what is open: cheap enough to ask again and again.
select count(*) filter (where status not in ('succeeded', 'failed', 'canceled')) as open,
       count(*) filter (
           where status in ('created', 'confirming', 'processing', 'canceling')
              or (status = 'succeeded' and progress ->> 'stripe_fee' is null)
              or (status = 'attempted' and terms ->> 'payment_method' is not null)
              or (status = 'requires_payment_method' and terms ->> 'on_decline' = 'fail')
              or expires_at < now()) as driven
from oncepay.payments p
where open_work
  and exists (select from oncepay.ranges r where p.slot between r.first and r.last)

-- name: payout_counts
-- Payouts that the platform still has to tell Tipalti of.
select count(*) from oncepay.payouts p
where open_work and status in ('created', 'submitting')
  and exists (select from oncepay.ranges r where p.slot between r.first and r.last)
