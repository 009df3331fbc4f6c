-- Replacing what is derived from a shard, in one transaction; `put.py` copies the rows.

-- name: forget_sums
select oncepay.forget_sums($1, $2)

-- name: any_rows
-- Whether there is anything of these slots.
select exists (select from oncepay.payments where slot <@ $1::int4multirange)
    or exists (select from oncepay.entry_rows where slot <@ $1::int4multirange)
    or exists (select from oncepay.link_rows where slot <@ $1::int4multirange)
    or exists (select from oncepay.seller_postings where slot <@ $1::int4multirange)
    or exists (select from oncepay.payment_versions where slot <@ $1::int4multirange)
    or exists (select from oncepay.payment_history_rows where slot <@ $1::int4multirange)

-- name: stage
select oncepay.stage_rebuild()

-- name: take
select of_table, changed from oncepay.take_rebuild($1, $2)

-- name: settle_postings
select oncepay.settle_postings($1, $2, $3)

-- name: forget_payouts
select oncepay.forget_payouts($1)

-- name: forget_versions
select oncepay.forget_versions($1)

-- name: sum_account_totals
-- As `fold` (fold.py) does it, of the entries that the shards $1, whose sums were forgotten, have outside of the slots $2; so are the
-- next two. The sellers' sums are made of their postings (`sum_postings`).
insert into oncepay.account_totals (account, currency, shard, debit, credit)
select p.account, e.currency, e.shard, sum(greatest(p.amount, 0)), sum(greatest(-p.amount, 0))
from oncepay.entries e cross join lateral unnest(e.accounts, e.amounts) p (account, amount)
where e.shard = any ($1::text[]) and not e.slot <@ $2::int4multirange and p.account not like 'seller:%:payable'
group by p.account, e.currency, e.shard

-- name: sum_account_days
insert into oncepay.account_days (account, currency, day, kind, shard, debit, credit)
select case when p.account like 'seller:%:payable' then 'seller:*:payable' else p.account end, e.currency,
       (e.created_at at time zone 'UTC')::date, e.kind, e.shard, sum(greatest(p.amount, 0)), sum(greatest(-p.amount, 0))
from oncepay.entries e cross join lateral unnest(e.accounts, e.amounts) p (account, amount)
where e.shard = any ($1::text[]) and not e.slot <@ $2::int4multirange
group by 1, 2, 3, 4, 5

-- name: sum_kinds
insert into oncepay.kind_totals (kind, currency, shard, entries, amount)
select e.kind, e.currency, e.shard, count(*),
       sum((select coalesce(sum(a.amount), 0) from unnest(e.amounts) a (amount) where a.amount > 0))
from oncepay.entries e
where e.shard = any ($1::text[]) and not e.slot <@ $2::int4multirange
group by e.kind, e.currency, e.shard

-- name: set_watermark
insert into oncepay.watermarks (shard, incarnation, epoch, lsn) values ($1, $2, $3, $4)
on conflict (shard) do update set incarnation = excluded.incarnation, epoch = excluded.epoch, lsn = excluded.lsn,
    applied_at = clock_timestamp()
