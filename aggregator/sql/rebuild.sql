-- Replacing what is derived from a shard, in one transaction; `apply.sql` has the statements that bring the rows.

-- name: forget_slots
select oncepay.forget_slots($1, $2)

-- name: forget_payouts
select oncepay.forget_payouts($1)

-- name: forget_versions
select oncepay.forget_versions($1)

-- name: any_version
-- Whether there is any history.
select exists (select from oncepay.payment_versions) or exists (select from oncepay.payment_history_rows)

-- name: sum_account_totals
-- As `fold` (fold.py) does it, of the entries that are left of the shards $1, whose sums were forgotten; so are the next two. The
-- sellers' sums are made of their postings (`sum_postings`).
insert into oncepay.account_totals (account, currency, shard, debit, credit)
select p.account, e.currency, e.shard, sum(greatest(p.amount, 0)), sum(greatest(-p.amount, 0))
from oncepay.entries e cross join lateral unnest(e.accounts, e.amounts) p (account, amount)
where e.shard = any ($1::text[]) and p.account not like 'seller:%:payable'
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
