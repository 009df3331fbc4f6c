-- What the API reads. Each request runs its statements in one REPEATABLE READ transaction with `positions`.

-- name: positions
select shard, lsn from oncepay.watermarks order by shard

-- name: revenue_whole
-- One row also when there is nothing: `first_day` is then null.
select min(day) as first_day, coalesce(sum(payments), 0)::bigint as payments, coalesce(sum(gross), 0)::bigint as gross,
       coalesce(sum(refunded), 0)::bigint as refunded, coalesce(sum(disputed), 0)::bigint as disputed,
       coalesce(sum(fees), 0)::bigint as fees, coalesce(sum(net), 0)::bigint as net
from oncepay.days_of($1)
where currency = $2 and ($3::date is null or day >= $3) and ($4::date is null or day <= $4)

-- name: revenue_by
-- $5 is day, week (from Monday) or month. `first_day` is the first day that the row covers.
select greatest(date_trunc($5, day::timestamp)::date, $3::date) as first_day, sum(payments)::bigint as payments,
       sum(gross)::bigint as gross, sum(refunded)::bigint as refunded, sum(disputed)::bigint as disputed,
       sum(fees)::bigint as fees, sum(net)::bigint as net
from oncepay.days_of($1)
where currency = $2 and ($3::date is null or day >= $3) and ($4::date is null or day <= $4)
group by 1
order by 1
limit $6

-- name: revenue_zoned
-- As revenue_by, in the time zone $7, from the postings themselves. An empty $5 is one row for the whole.
select coalesce(greatest(date_trunc(nullif($5, ''), p.local)::date, $3::date), $3::date, min(p.local)::date) as first_day,
       count(*) filter (where p.category = 'payment') as payments,
       coalesce(sum(p.total) filter (where p.category = 'payment'), 0)::bigint as gross,
       coalesce(-sum(p.total) filter (where p.category = 'refund'), 0)::bigint as refunded,
       coalesce(-sum(p.total) filter (where p.category = 'dispute'), 0)::bigint as disputed,
       sum(p.fee)::bigint as fees, sum(p.total - p.fee)::bigint as net
from (
    select created_at at time zone $7 as local, split_part(kind, '_', 1) as category, total, fee
    from oncepay.seller_postings
    where seller = $1 and currency = $2
      and ($3::date is null or created_at >= $3::date::timestamp at time zone $7)
      and ($4::date is null or created_at < ($4::date + 1)::timestamp at time zone $7)) p
where p.category in ('payment', 'refund', 'dispute')
group by date_trunc(nullif($5, ''), p.local)
order by 1
limit $6

-- name: balance
-- `pending`: what payments since $2 brought and haven't lost again; it isn't paid out yet.
select t.currency, sum(t.debit) as debit, sum(t.credit) as credit, (
    select coalesce(sum(greatest(k.amount, 0)), 0)
    from (
        select sum(p.amount) as amount
        from oncepay.seller_postings p
        where p.seller = $1 and p.currency = t.currency and p.created_at >= $2
        group by p.key
        having bool_or(p.kind = 'payment')) k) as pending
from oncepay.account_of($1) t
group by t.currency
order by t.currency

-- name: owed_from
-- What the seller is owed now, and the part of it that comes from $3 on (in the order of the statement: $4 and $5 are the key
-- and the entry that are the first ones left out, or empty).
select coalesce((select sum(credit - debit) from oncepay.account_of($1) where currency = $2), 0) as owed,
       coalesce((
           select sum(amount) from oncepay.seller_postings
           where seller = $1 and currency = $2 and (created_at, key, entry_id) > ($3::timestamptz, $4::text, $5::text)), 0) as since

-- name: day_begins
select $1::date::timestamp at time zone $2 as moment

-- name: statement
-- The page after the entry ($4, $5, $6), up to the moment $3.
select created_at, key, entry_id, kind, amount
from oncepay.seller_postings
where seller = $1 and currency = $2 and ($3::timestamptz is null or created_at < $3)
  and (created_at, key, entry_id) > ($4::timestamptz, $5::text, $6::text)
order by created_at, key, entry_id
limit $7

-- name: trial_balance
-- By account, less what came after the positions $2 of the shards $1.
select account, currency, sum(debit) as debit, sum(credit) as credit
from (
    select case when account like 'seller:%:payable' then 'seller:*:payable' else account end as account, currency, debit, credit
    from oncepay.current_account_totals
    where $3::text is null or currency = $3
    union all
    select case when p.account like 'seller:%:payable' then 'seller:*:payable' else p.account end, e.currency,
           -greatest(p.amount, 0), -greatest(-p.amount, 0)
    from unnest($1::text[], $2::pg_lsn[]) a (shard, lsn)
    cross join lateral (select * from oncepay.entries e where e.shard = a.shard and e.lsn > a.lsn offset 0) e
    cross join lateral unnest(e.accounts, e.amounts) p (account, amount)
    where $3::text is null or e.currency = $3) t
group by account, currency
having sum(debit) <> 0 or sum(credit) <> 0
order by currency, account

-- name: profit
-- The platform's own accounts, a row an interval ($4; empty: one for the whole).
select coalesce(greatest(date_trunc(nullif($4, ''), day::timestamp)::date, $2::date), $2::date, min(day)) as first_day,
       coalesce(sum(credit - debit) filter (where account = 'platform:fees'), 0) as fees,
       coalesce(sum(debit - credit) filter (where account = 'stripe:fees'), 0) as stripe_fees,
       coalesce(sum(debit - credit) filter (where account = 'tipalti:fees'), 0) as tipalti_fees,
       coalesce(sum(debit - credit) filter (where account = 'stripe:other'), 0) as stripe_other,
       coalesce(sum(debit - credit) filter (where account = 'seller:*:payable' and kind like 'dispute%'), 0) as disputed
from oncepay.account_days
where currency = $1 and ($2::date is null or day >= $2) and ($3::date is null or day <= $3)
group by date_trunc(nullif($4, ''), day::timestamp)
order by 1
limit $5

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
from oncepay.current_seller_days
where ($1::text is null or currency = $1)
group by seller, currency
order by sum(gross) desc, seller, currency
limit $2

-- name: accounts
-- The sellers' accounts are shown as one: there may be very many.
select case when account like 'seller:%:payable' then 'seller:*:payable' else account end as account, currency,
       sum(debit) as debit, sum(credit) as credit
from oncepay.current_account_totals
group by 1, 2
order by 1, 2

-- name: kinds
select kind, currency, sum(entries)::bigint as entries, sum(amount) as amount
from oncepay.kind_totals
group by kind, currency
order by kind, currency
