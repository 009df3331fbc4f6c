-- What of a shard's tables the aggregator derives from, read whole in one snapshot for a rebuild.

-- name: ranges
select first, last from oncepay.ranges order by first

-- name: expected
-- How many rows there will be, about: for a progress bar.
select coalesce(sum(greatest(reltuples, 0)), 0)::bigint from pg_class
where oid in ('oncepay.payments'::regclass, 'oncepay.entries'::regclass, 'oncepay.balance_links'::regclass,
              'oncepay.payouts'::regclass)

-- name: unusual_payments
-- Those that `payments` leaves out: rows of earlier versions, terms whose shares don't follow from their items, and what jsonb can't hold.
select slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, intent, coalesce(agreed, terms::text),
       coalesce(course, progress::text),
       (extract(epoch from created_at) * 1000000)::bigint, (extract(epoch from updated_at) * 1000000)::bigint,
       (extract(epoch from expires_at) * 1000000)::bigint, open_work, event, actor
from oncepay.payments e
where not coalesce(
        e.agreed like '[%' and strpos(e.agreed, '\u0000') = 0 and e.course like '[%' and strpos(e.course, '\u0000') = 0, false)
    and {part} and exists (select from oncepay.ranges r where e.slot between r.first and r.last)

-- name: blocks
select pg_relation_size($1::text::regclass) / current_setting('block_size')::bigint

-- name: payments
-- This and the next ones are as COPY writes them: the columns of `oncepay.feed.COPIED`. Which part of the table, and the position, are put
-- in. The short arrays of terms and progress are `oncepay.payment_text`'s; their texts are JSON already, and jsonb writes them alike.
select $1::text, e.key, e.slot, e.version, e.amount, e.amount_captured, e.amount_refunded, e.created_at, e.updated_at, '{lsn}'::pg_lsn,
       e.status, e.buyer, e.currency, e.intent,
       (select '[' || string_agg(
            '{"seller":' || (i -> 0)::text || ',"amount":' || (i -> 1)::text
                || case when (i -> 2)::text <> '1' then ',"quantity":' || (i -> 2)::text else '' end
                || case when (i -> 3)::text <> '""' then ',"description":' || (i -> 3)::text else '' end || '}', ',' order by n) || ']'
        from jsonb_array_elements(t.agreed -> 0) with ordinality l (i, n)),
       (select coalesce(sum(fee::bigint), 0)::bigint from jsonb_array_elements(t.agreed -> 1) f (fee)),
       nullif((e.course::json -> 6)::text, 'null')
from oncepay.payments e cross join lateral (select e.agreed::jsonb as agreed offset 0) t
where e.agreed like '[%' and strpos(e.agreed, '\u0000') = 0 and e.course like '[%' and strpos(e.course, '\u0000') = 0
    and {part} and exists (select from oncepay.ranges r where e.slot between r.first and r.last)

-- name: entry_rows
-- The kind is where `oncepay.entry_rows` keeps it.
select $1::text, e.key, e.entry_id,
       coalesce(e.kind, case when e.source is not null then e.entry_id else split_part(e.entry_id, ':', 1) end), e.currency, e.slot,
       e.created_at, '{lsn}'::pg_lsn, e.source, e.accounts, e.amounts, e.sellers, e.balance_transaction, e.fee
from oncepay.entries e where {part} and exists (select from oncepay.ranges r where e.slot between r.first and r.last)

-- name: link_rows
select $1::text, e.balance_transaction, e.key, e.entry_id, e.slot, e.created_at, '{lsn}'::pg_lsn
from oncepay.balance_links e where {part} and exists (select from oncepay.ranges r where e.slot between r.first and r.last)

-- name: payment_versions
-- A payment's last version, as the aggregator keeps history: [version, status, event, actor, committed at (ms since 1970), position].
select $1::text, e.key, e.slot, e.version, e.version,
       '[[' || e.version || ',' || to_json(e.status)::text || ',' || to_json(e.event)::text || ',' || to_json(e.actor)::text || ','
       || (extract(epoch from e.updated_at) * 1000000)::bigint / 1000 || ',null]]'
from oncepay.payments e
where {part} and exists (select from oncepay.ranges r where e.slot between r.first and r.last)

-- name: payouts
select slot, key, seller, currency, sequence, status, version, amount, payee, ref_code, run, created_by, positions::text,
       progress::text, open_work, (extract(epoch from created_at) * 1000000)::bigint, (extract(epoch from updated_at) * 1000000)::bigint
from oncepay.payouts p where exists (select from oncepay.ranges r where p.slot between r.first and r.last)
