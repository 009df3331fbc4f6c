-- What the checker reads of the aggregator, in one REPEATABLE READ transaction.

-- name: positions
select shard, lsn from oncepay.watermarks

-- name: payments
select key, slot, status, version, buyer, currency, amount, amount_captured, amount_refunded, coalesce(payment_intent, '')
from oncepay.payments

-- name: entries
select shard, slot, key, entry_id, kind, currency, source, accounts, amounts, sellers,
       (extract(epoch from created_at) * 1000000)::bigint
from oncepay.entries

-- name: links
select balance_transaction, key, entry_id from oncepay.balance_links

-- name: seller_days
select seller, currency, day - date '1970-01-01', sum(payments)::bigint, sum(gross)::bigint, sum(refunded)::bigint,
       sum(disputed)::bigint, sum(fees)::bigint, sum(net)::bigint
from oncepay.current_seller_days
group by 1, 2, 3

-- name: accounts
select account, currency, sum(debit), sum(credit) from oncepay.current_account_totals group by 1, 2

-- name: kinds
select kind, currency, sum(entries)::bigint, sum(amount) from oncepay.kind_totals group by 1, 2

-- name: payouts
select key, status, version, amount from oncepay.payouts
