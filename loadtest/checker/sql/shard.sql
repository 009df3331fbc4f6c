-- What the checker reads of a shard, in one REPEATABLE READ transaction.

-- name: ranges
select first, last from oncepay.ranges order by first

-- name: payments
select slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, coalesce(intent, ''),
       coalesce(agreed, terms::text), coalesce(course, progress::text), expires_at < now()
from oncepay.payments

-- name: entries
select slot, key, entry_id, kind, currency, source, accounts, amounts, sellers,
       (extract(epoch from created_at) * 1000000)::bigint
from oncepay.ledger

-- name: links
select balance_transaction, key, entry_id from oncepay.transaction_links

-- name: payouts
select slot, key, seller, currency, sequence, status, version, amount, ref_code, coalesce((progress ->> 'fee')::bigint, 0),
       coalesce(progress ->> 'reference', ''), (extract(epoch from created_at) * 1000000)::bigint
from oncepay.payouts

-- name: counts
-- Served by the partial index on what is open: cheap enough to ask again and again.
select count(*) filter (where status not in ('succeeded', 'failed', 'canceled')) as open,
       count(*) filter (
           where status in ('created', 'confirming', 'processing', 'canceling')
              or (status = 'succeeded'
                  and coalesce((course::jsonb ->> 3)::bigint, (progress ->> 'stripe_fee')::bigint, -1) < 0)
              or (status = 'attempted'
                  and coalesce(agreed::jsonb ->> 3, terms ->> 'payment_method', '') <> '')
              or (status = 'requires_payment_method' and coalesce(agreed::jsonb ->> 4, terms ->> 'on_decline') = 'fail')
              or expires_at < now()) as driven
from oncepay.payments p
where open_work
  and exists (select from oncepay.ranges r where p.slot between r.first and r.last)

-- name: payout_counts
-- Payouts that the platform still has to tell Tipalti of.
select count(*) from oncepay.payouts p
where open_work and status in ('created', 'submitting')
  and exists (select from oncepay.ranges r where p.slot between r.first and r.last)
