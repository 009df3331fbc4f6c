-- Replacing what is derived from a shard, in one transaction; `apply.sql` has the statements that bring the rows.

-- name: forget_slots
select oncepay.forget_slots($1, $2)

-- name: forget_payouts
select oncepay.forget_payouts($1)

-- name: forget_versions
select oncepay.forget_versions($1)

-- name: sort_in_memory
-- The sums of millions of entries are grouped here, in one session at a time for each shard.
set local work_mem = '64MB'

-- name: sum_seller_days
-- As `fold` (fold.py) does it, of all entries of the shards $1, whose sums were forgotten.
insert into oncepay.seller_days (seller, currency, day, shard, payments, gross, refunded, disputed, fees, net)
select s.seller, s.currency, s.day, s.shard, s.payments, s.gross, s.refunded, s.disputed, s.fees,
       s.gross - s.refunded - s.disputed - s.fees
from (
    select p.seller, e.currency, (e.created_at at time zone 'UTC')::date as day, e.shard,
           count(*) filter (where c.category = 'payment') as payments,
           coalesce(sum(p.total) filter (where c.category = 'payment'), 0)::bigint as gross,
           coalesce(-sum(p.total) filter (where c.category = 'refund'), 0)::bigint as refunded,
           coalesce(-sum(p.total) filter (where c.category = 'dispute'), 0)::bigint as disputed,
           sum(p.fee)::bigint as fees
    from oncepay.entries e
    cross join lateral (values (split_part(e.kind, '_', 1))) c (category)
    cross join lateral (
        select x.seller, -sum(x.amount) as total,
               coalesce(-sum(x.amount) filter (where x.account = 'platform:fees' and x.seller <> 'platform'), 0) as fee
        from unnest(e.accounts, e.amounts, e.sellers) x (account, amount, seller)
        where x.seller <> ''
        group by x.seller) p
    where e.shard = any ($1::text[]) and c.category in ('payment', 'refund', 'dispute')
    group by p.seller, e.currency, day, e.shard) s

-- name: sum_account_totals
insert into oncepay.account_totals (account, currency, shard, debit, credit)
select p.account, e.currency, e.shard, sum(greatest(p.amount, 0)), sum(greatest(-p.amount, 0))
from oncepay.entries e cross join lateral unnest(e.accounts, e.amounts) p (account, amount)
where e.shard = any ($1::text[])
group by p.account, e.currency, e.shard

-- name: sum_account_days
insert into oncepay.account_days (account, currency, day, kind, shard, debit, credit)
select case when p.account like 'seller:%:payable' then 'seller:*:payable' else p.account end, e.currency,
       (e.created_at at time zone 'UTC')::date, e.kind, e.shard, sum(greatest(p.amount, 0)), sum(greatest(-p.amount, 0))
from oncepay.entries e cross join lateral unnest(e.accounts, e.amounts) p (account, amount)
where e.shard = any ($1::text[])
group by 1, 2, 3, 4, 5

-- name: sum_kinds
insert into oncepay.kind_totals (kind, currency, shard, entries, amount)
select e.kind, e.currency, e.shard, count(*),
       sum((select coalesce(sum(a.amount), 0) from unnest(e.amounts) a (amount) where a.amount > 0))
from oncepay.entries e
where e.shard = any ($1::text[])
group by e.kind, e.currency, e.shard

-- name: set_watermark
insert into oncepay.watermarks (shard, incarnation, epoch, lsn) values ($1, $2, $3, $4)
on conflict (shard) do update set incarnation = excluded.incarnation, epoch = excluded.epoch, lsn = excluded.lsn,
    applied_at = clock_timestamp()
