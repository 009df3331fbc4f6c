-- What the API reads. Each request runs its statements in one REPEATABLE READ transaction with `positions`.

-- name: positions
select shard, lsn from oncepay.watermarks order by shard

-- name: revenue_whole
-- One row also when there is nothing: `first_day` is then null.
select min(day) as first_day, coalesce(sum(payments), 0)::bigint as payments, coalesce(sum(gross), 0)::bigint as gross,
       coalesce(sum(refunded), 0)::bigint as refunded, coalesce(sum(disputed), 0)::bigint as disputed,
       coalesce(sum(fees), 0)::bigint as fees, coalesce(sum(net), 0)::bigint as net
from oncepay.seller_days
where seller = $1 and currency = $2 and ($3::date is null or day >= $3) and ($4::date is null or day <= $4)

-- name: revenue_by
-- $5 is day, week (from Monday) or month. `first_day` is the first day that the row covers.
select greatest(date_trunc($5, day::timestamp)::date, $3::date) as first_day, sum(payments)::bigint as payments,
       sum(gross)::bigint as gross, sum(refunded)::bigint as refunded, sum(disputed)::bigint as disputed,
       sum(fees)::bigint as fees, sum(net)::bigint as net
from oncepay.seller_days
where seller = $1 and currency = $2 and ($3::date is null or day >= $3) and ($4::date is null or day <= $4)
group by 1
order by 1

-- name: balance
select currency, sum(debit) as debit, sum(credit) as credit
from oncepay.account_totals where account = $1
group by currency
order by currency

-- name: orders
-- Newest first; $2 and $3 are the last order of the page before, or null.
select key, status, buyer, currency, amount, amount_captured, amount_refunded, items, platform_fee, payment_intent, failure,
       created_at, updated_at, version
from oncepay.payments
where buyer = $1 and ($2::timestamptz is null or (created_at, key) < ($2, $3::text))
order by created_at desc, key desc
limit $4

-- name: history
select version, status, event, actor, committed_at as at, shard, lsn::text as lsn
from oncepay.payment_history where key = $1 order by version

-- name: sellers
select seller, currency, sum(payments)::bigint as payments, sum(gross)::bigint as gross, sum(fees)::bigint as fees,
       sum(net)::bigint as net
from oncepay.seller_days
where ($1::text is null or currency = $1)
group by seller, currency
order by sum(gross) desc, seller, currency
limit $2

-- name: accounts
-- The sellers' accounts are shown as one: there may be very many.
select case when account like 'seller:%:payable' then 'seller:*:payable' else account end as account, currency,
       sum(debit) as debit, sum(credit) as credit
from oncepay.account_totals
group by 1, 2
order by 1, 2

-- name: kinds
select kind, currency, sum(entries)::bigint as entries, sum(amount) as amount
from oncepay.kind_totals
group by kind, currency
order by kind, currency
