-- Replacing what is derived from a shard, in one transaction; `apply.sql` has the statements that bring the rows.

-- name: forget_slots
select oncepay.forget_slots($1, $2)

-- name: forget_payouts
select oncepay.forget_payouts($1)

-- name: forget_versions
select oncepay.forget_versions($1)

-- name: entries_of
-- What is left of a shard's entries, read page by page to make its sums again.
select kind, currency, accounts, amounts, sellers, (extract(epoch from created_at) * 1000000)::bigint as created_at_us
from oncepay.entries where shard = $1

-- name: set_watermark
insert into oncepay.watermarks (shard, incarnation, epoch, lsn) values ($1, $2, $3, $4)
on conflict (shard) do update set incarnation = excluded.incarnation, epoch = excluded.epoch, lsn = excluded.lsn,
    applied_at = clock_timestamp()
