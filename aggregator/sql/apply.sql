-- Applying one batch of a feed, in one transaction. What is new comes by COPY (put.py); these statements are for what may be here
-- already. Every array is sorted by the table's key, so that two shards' batches that touch the same row never wait for each
-- other in a ring; most come as literals, which Postgres reads faster than Python encodes arrays.

-- name: lock_watermark
-- The shard's row, locked until the batch is in or refused.
select incarnation, epoch, lsn, case when open_since is not null then summed_lsn end as after_lsn, open_postings, open_of_one
from oncepay.watermarks where shard = $1 for update

-- name: begin_watermark
-- A shard never seen begins where its first batch does.
insert into oncepay.watermarks (shard, incarnation, epoch, lsn) values ($1, $2, $3, $4) on conflict (shard) do nothing

-- name: stand_already
-- Whether one of the fees ($1 keys, $2 ids) or links ($3 transactions, $4 keys, $5 ids) is told by the row of its payment.
select exists (
    select from unnest($1::text::text[], $2::text::text[]) u (key, entry_id)
    cross join lateral (select from oncepay.entry_rows e
                        where e.key = u.key and e.fee is not null and u.entry_id = 'stripe_fee:' || e.balance_transaction) e)
    or exists (
    select from unnest($3::text::text[], $4::text::text[], $5::text::text[]) u (balance_transaction, key, entry_id)
    cross join lateral (select from oncepay.entry_rows e
                        where e.balance_transaction = u.balance_transaction and e.key = u.key
                          and (e.entry_id = u.entry_id or e.fee is not null and u.entry_id = 'stripe_fee:' || e.balance_transaction)) e)

-- name: insert_entries
-- Only an entry that wasn't here comes back, and only that one is added to the sums and to the sellers' postings.
insert into oncepay.entry_rows (
    key, entry_id, slot, kind, currency, source, accounts, amounts, sellers, created_at, shard, lsn, balance_transaction, fee)
select u.key, u.entry_id, u.slot, u.kind, u.currency, u.source, u.accounts::text[], u.amounts::bigint[], u.sellers::text[],
       u.created_at, $1, u.lsn, u.balance_transaction, u.fee
from unnest($2::text[], $3::text[], $4::integer[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[],
            $11::timestamptz[], $12::pg_lsn[], $13::text[], $14::bigint[])
     u (key, entry_id, slot, kind, currency, source, accounts, amounts, sellers, created_at, lsn, balance_transaction, fee)
where u.kind <> 'stripe_fee' or not exists (
    select from oncepay.entry_rows e
    where e.key = u.key and e.fee is not null and u.entry_id = 'stripe_fee:' || e.balance_transaction)
on conflict (key, entry_id) do nothing
returning key, entry_id

-- name: differing_entries
-- Entries that were here before, of another content: an entry never changes, so one of the two is wrong.
select e.key, e.entry_id
from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[])
     u (key, entry_id, kind, currency, source, accounts, amounts, sellers)
cross join lateral (select * from oncepay.entries e where e.key = u.key and e.entry_id = u.entry_id offset 0) e
where (e.kind, e.currency, e.source, e.accounts, e.amounts, e.sellers)
    is distinct from (u.kind, u.currency, u.source, u.accounts::text[], u.amounts::bigint[], u.sellers::text[])

-- name: insert_links
insert into oncepay.link_rows (balance_transaction, key, entry_id, slot, created_at, shard, lsn)
select u.balance_transaction, u.key, u.entry_id, u.slot, timestamptz 'epoch' + u.created_us * interval '1 microsecond', $1, u.lsn
from unnest($2::text::text[], $3::text::text[], $4::text::text[], $5::text::integer[], $6::text::bigint[], $7::text::pg_lsn[])
     u (balance_transaction, key, entry_id, slot, created_us, lsn)
where not exists (
    select from oncepay.entry_rows e
    where e.balance_transaction = u.balance_transaction and e.key = u.key
      and (e.entry_id = u.entry_id or e.fee is not null and u.entry_id = 'stripe_fee:' || e.balance_transaction))
on conflict (balance_transaction, key, entry_id) do nothing

-- name: upsert_payments
-- The highest version stays. Null items and platform_fee, and an empty failure, are not known: what is here stays.
insert into oncepay.payments as p (
    key, slot, status, version, buyer, currency, amount, amount_captured, amount_refunded, payment_intent, items,
    platform_fee, failure, created_at, updated_at, shard, lsn)
select u.key, u.slot, u.status, u.version, u.buyer, u.currency, u.amount, u.captured, u.refunded, u.intent, u.items,
       u.fee, u.failure, timestamptz 'epoch' + u.created_us * interval '1 microsecond',
       timestamptz 'epoch' + u.updated_us * interval '1 microsecond', $1, u.lsn
from unnest($2::text::text[], $3::text::integer[], $4::text::text[], $5::text::bigint[], $6::text::text[], $7::text::text[],
            $8::text::bigint[], $9::text::bigint[], $10::text::bigint[], $11::text::text[], $12::text::text[],
            $13::text::bigint[], $14::text::text[], $15::text::bigint[], $16::text::bigint[], $17::text::pg_lsn[])
     u (key, slot, status, version, buyer, currency, amount, captured, refunded, intent, items, fee, failure, created_us,
        updated_us, lsn)
on conflict (key) do update set
    status = excluded.status, version = excluded.version, amount_captured = excluded.amount_captured,
    amount_refunded = excluded.amount_refunded, payment_intent = excluded.payment_intent,
    items = coalesce(excluded.items, p.items), platform_fee = coalesce(excluded.platform_fee, p.platform_fee),
    failure = case when excluded.failure = '' then p.failure else excluded.failure end,
    updated_at = excluded.updated_at, shard = excluded.shard, lsn = excluded.lsn
where excluded.version > p.version

-- name: fill_terms
-- An older version that came later may be the one that brings the terms, which never change.
update oncepay.payments p set items = u.items, platform_fee = u.fee
from unnest($1::text::text[], $2::text::text[], $3::text::bigint[]) u (key, items, fee)
where p.key = u.key and p.items is null and u.items is not null

-- name: add_sums
with of_sellers as (
    insert into oncepay.seller_days as d (seller, currency, day, shard, payments, gross, refunded, disputed, fees, net)
    select u.seller, u.currency, u.day, $1, u.payments, u.gross, u.refunded, u.disputed, u.fees,
           u.gross - u.refunded - u.disputed - u.fees
    from unnest($2::text::text[], $3::text::text[], $4::text::date[], $5::text::bigint[], $6::text::bigint[], $7::text::bigint[],
                $8::text::bigint[], $9::text::bigint[])
         u (seller, currency, day, payments, gross, refunded, disputed, fees)
    on conflict (seller, currency, day, shard) do update set
        payments = d.payments + excluded.payments, gross = d.gross + excluded.gross, refunded = d.refunded + excluded.refunded,
        disputed = d.disputed + excluded.disputed, fees = d.fees + excluded.fees, net = d.net + excluded.net
), of_accounts as (
    insert into oncepay.account_totals as t (account, currency, shard, debit, credit)
    select u.account, u.currency, $1, u.debit, u.credit
    from unnest($10::text::text[], $11::text::text[], $12::text::numeric[], $13::text::numeric[]) u (account, currency, debit, credit)
    on conflict (account, currency, shard) do update set debit = t.debit + excluded.debit, credit = t.credit + excluded.credit
), of_days as (
    insert into oncepay.account_days as t (account, currency, day, kind, shard, debit, credit)
    select u.account, u.currency, u.day, u.kind, $1, u.debit, u.credit
    from unnest($14::text::text[], $15::text::text[], $16::text::date[], $17::text::text[], $18::text::numeric[],
                $19::text::numeric[])
         u (account, currency, day, kind, debit, credit)
    on conflict (account, currency, day, kind, shard) do update set
        debit = t.debit + excluded.debit, credit = t.credit + excluded.credit
)
insert into oncepay.kind_totals as t (kind, currency, shard, entries, amount)
select u.kind, u.currency, $1, u.entries, u.amount
from unnest($20::text::text[], $21::text::text[], $22::text::bigint[], $23::text::numeric[]) u (kind, currency, entries, amount)
on conflict (kind, currency, shard) do update set entries = t.entries + excluded.entries, amount = t.amount + excluded.amount

-- name: open_postings
-- The postings after the position $2, of which the earliest is of $3 (microseconds since 1970), are left for later.
update oncepay.watermarks
set summed_lsn = case when open_since is null then $2 else summed_lsn end,
    open_since = least(open_since, timestamptz 'epoch' + $3::bigint * interval '1 microsecond'),
    open_postings = open_postings + $4, open_of_one = open_of_one + $5
where shard = $1

-- name: sum_in_memory
-- Sums are grouped by hash: sorting as many names takes several times as long.
select set_config('work_mem', '128MB', true), set_config('enable_sort', 'off', true)

-- name: by_position
-- Statistics never know the newest rows: all would be read for them.
select set_config('enable_seqscan', 'off', true)

-- name: sum_postings
-- Adds the postings of the shards $1 from the position $2 on to the sellers' days and accounts.
with s as materialized (
    select shard, seller, currency, day, bool_or(counts) as counts, sum(payments) as payments, sum(gross)::bigint as gross,
           sum(refunded)::bigint as refunded, sum(disputed)::bigint as disputed, sum(fees)::bigint as fees,
           sum(debit) as debit, sum(credit) as credit
    from oncepay.seller_movements
    where shard = any ($1::text[]) and lsn >= $2
    group by shard, seller, currency, day
), days as (
    insert into oncepay.seller_days as d (seller, currency, day, shard, payments, gross, refunded, disputed, fees, net)
    select seller, currency, day, shard, payments, gross, refunded, disputed, fees, gross - refunded - disputed - fees
    from s where counts
    order by seller, currency, day, shard
    on conflict (seller, currency, day, shard) do update set
        payments = d.payments + excluded.payments, gross = d.gross + excluded.gross, refunded = d.refunded + excluded.refunded,
        disputed = d.disputed + excluded.disputed, fees = d.fees + excluded.fees, net = d.net + excluded.net
)
insert into oncepay.account_totals as t (account, currency, shard, debit, credit)
select 'seller:' || seller || ':payable', currency, shard, sum(debit), sum(credit)
from s where debit is not null
group by seller, currency, shard
order by 1, 2, 3
on conflict (account, currency, shard) do update set debit = t.debit + excluded.debit, credit = t.credit + excluded.credit

-- name: close_postings
update oncepay.watermarks set open_since = null, open_postings = 0, open_of_one = 0 where shard = $1

-- name: move_watermark
update oncepay.watermarks set lsn = $2, epoch = $3, applied_at = clock_timestamp() where shard = $1
