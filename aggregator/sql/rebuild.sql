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

-- name: be_patient
-- A worker may be silent while it waits for its barrier, or reads what gives no rows; one that is gone for good is not waited for.
select set_config('idle_in_transaction_session_timeout', '300s', true)

-- name: stage
select oncepay.stage_rebuild()

-- name: take_ledger
select of_table, changed from oncepay.take_ledger($1, $2)

-- name: take_payments
select of_table, changed from oncepay.take_payments($1, $2)

-- name: settle_postings
select oncepay.settle_postings($1, $2, $3)

-- name: forget_payouts
select oncepay.forget_payouts($1)

-- name: forget_versions
select oncepay.forget_versions($1)

-- name: check
select oncepay.check_rebuild($1, $2, $3, $4, $5)

-- name: derive_postings
select oncepay.derive_postings($1)

-- name: sum_account_days
-- As `fold` (fold.py) does it, of all entries that the shards $1 have, whose sums were forgotten; the next two make theirs of these. The
-- sellers' sums are made of their postings (`sum_postings`). An account is null when its code isn't known.
insert into oncepay.account_days (account, currency, day, kind, shard, debit, credit)
select account, currency, day, kind, shard, sum(debit), sum(credit)
from (
    select case when e.sellers is not null then case when p.account like 'seller:%:payable' then 'seller:*:payable' else p.account end
                when p.account ^@ 'P' then 'seller:*:payable'
                when p.account ^@ 'F' then 'platform:fees'
                else oncepay.decoded_account(p.account) end as account,
           e.currency, e.day, e.kind, e.shard, greatest(p.amount, 0) as debit, greatest(-p.amount, 0) as credit
    from (
        select accounts, amounts, sellers, currency, (created_at at time zone 'UTC')::date as day, kind, shard
        from oncepay.entry_rows where shard = any ($1::text[]) offset 0) e
    cross join lateral unnest(e.accounts, e.amounts) p (account, amount)
    union all
    select a.account, e.currency, e.day, 'stripe_fee', e.shard, a.debit, a.credit
    from (
        select currency, (created_at at time zone 'UTC')::date as day, shard, sum(greatest(fee, 0)) as paid, sum(greatest(-fee, 0)) as back
        from oncepay.entry_rows where shard = any ($1::text[]) and fee is not null group by 1, 2, 3) e
    cross join lateral (values ('stripe:fees', e.paid, e.back), ('stripe:clearing', e.back, e.paid)) a (account, debit, credit)) p
group by account, currency, day, kind, shard

-- name: sum_account_totals
insert into oncepay.account_totals (account, currency, shard, debit, credit)
select account, currency, shard, sum(debit), sum(credit)
from oncepay.account_days
where shard = any ($1::text[]) and account <> 'seller:*:payable'
group by account, currency, shard

-- name: sum_kinds
insert into oncepay.kind_totals (kind, currency, shard, entries, amount)
select kind, currency, shard, n.entries, a.amount
from (
    select kind, currency, shard, sum(entries) as entries
    from (
        select kind, currency, shard, count(*) as entries
        from oncepay.entry_rows where shard = any ($1::text[]) group by kind, currency, shard
        union all
        select 'stripe_fee', currency, shard, count(*)
        from oncepay.entry_rows where shard = any ($1::text[]) and fee is not null group by currency, shard) e
    group by kind, currency, shard) n
join (
    select kind, currency, shard, sum(debit) as amount
    from oncepay.account_days where shard = any ($1::text[]) group by kind, currency, shard) a using (kind, currency, shard)

-- name: set_watermark
insert into oncepay.watermarks (shard, incarnation, epoch, lsn) values ($1, $2, $3, $4)
on conflict (shard) do update set incarnation = excluded.incarnation, epoch = excluded.epoch, lsn = excluded.lsn,
    applied_at = clock_timestamp()
