-- The background audit: samples of what is derived, against the shards and against itself.

-- The planner would make one join of all of the ledger's rows and a sample: `offset 0` and `limit 1` keep it from that.

-- name: shard_sample
-- Run on a shard: the entries of $2 keys from slot $1 on, of the slots that it owns, and how far its log was.
select s.key, s.entry_id, s.kind, s.currency, s.source, s.accounts, s.amounts, s.sellers, pg_current_wal_insert_lsn() as position
from (
    select l.*
    from (
        select e.slot, e.key from oncepay.entries e
        where e.slot >= $1 and exists (select from oncepay.ranges r where e.slot between r.first and r.last)
        group by e.slot, e.key
        order by e.slot, e.key
        limit $2) k
    cross join lateral (select * from oncepay.ledger l where l.slot = k.slot and l.key = k.key offset 0) l) s

-- name: shard_has
-- Run on a shard: those of the entries that it has.
select u.key, u.entry_id
from unnest($1::integer[], $2::text[], $3::text[]) u (slot, key, entry_id)
cross join lateral (
    select from oncepay.ledger e where e.slot = u.slot and e.key = u.key and e.entry_id = u.entry_id limit 1) e

-- name: ours
select e.key, e.entry_id, e.kind, e.currency, e.source, e.accounts, e.amounts, e.sellers
from unnest($1::text[], $2::text[]) u (key, entry_id)
cross join lateral (select * from oncepay.entries e where e.key = u.key and e.entry_id = u.entry_id offset 0) e

-- name: our_sample
-- Entries whose keys come after $1, and which shard brought them.
select key, entry_id, slot from oncepay.entry_rows where key > $1 order by key, entry_id limit $2

-- name: postings_differ
-- Of these entries, those whose sellers' postings are not what they say.
select distinct coalesce(a.key, b.key) as key
from (
    select e.key, e.entry_id, e.created_at, s.seller, e.currency, s.amount, s.total, s.fee
    from unnest($1::text[], $2::text[]) u (key, entry_id)
    cross join lateral (select * from oncepay.entries e where e.key = u.key and e.entry_id = u.entry_id offset 0) e
    cross join lateral oncepay.by_seller(e.accounts, e.amounts, e.sellers) s) a
left join oncepay.seller_postings b
    on b.seller = a.seller and b.currency = a.currency and b.created_at = a.created_at and b.key = a.key and b.entry_id = a.entry_id
where (b.amount, b.total, b.fee) is distinct from (a.amount, a.total, a.fee)

-- name: sellers_differ
-- Of these sellers, those whose balance or revenue is not what their postings come to.
with folded as (
    select p.seller, p.currency, sum(p.amount) as owed,
           sum(p.total - p.fee) filter (where split_part(p.kind, '_', 1) in ('payment', 'refund', 'dispute')) as net
    from oncepay.seller_postings p
    where p.seller = any ($1::text[])
    group by p.seller, p.currency
), totals as (
    select u.seller, t.currency, sum(t.credit - t.debit) as owed
    from unnest($1::text[]) u (seller)
    cross join lateral oncepay.account_of(u.seller) t
    group by u.seller, t.currency
), days as (
    select u.seller, d.currency, sum(d.net) as net
    from unnest($1::text[]) u (seller) cross join lateral oncepay.days_of(u.seller) d
    group by u.seller, d.currency
)
select coalesce(f.seller, t.seller, d.seller) as seller
from folded f
full join totals t on t.seller = f.seller and t.currency = f.currency
full join days d on d.seller = coalesce(f.seller, t.seller) and d.currency = coalesce(f.currency, t.currency)
where coalesce(f.owed, 0) <> coalesce(t.owed, 0) or coalesce(f.net, 0) <> coalesce(d.net, 0)

-- name: accounts_differ
-- Currencies that don't balance, and accounts whose days don't come to their totals.
select currency || ' doesn''t balance' as what
from oncepay.current_account_totals group by currency having sum(debit) <> sum(credit)
union all
select coalesce(t.account, d.account) || ' ' || coalesce(t.currency, d.currency)
from (
    select case when account like 'seller:%:payable' then 'seller:*:payable' else account end as account, currency,
           sum(debit) as debit, sum(credit) as credit
    from oncepay.current_account_totals group by 1, 2) t
full join (
    select account, currency, sum(debit) as debit, sum(credit) as credit from oncepay.account_days group by 1, 2) d
    on d.account = t.account and d.currency = t.currency
where (coalesce(t.debit, 0), coalesce(t.credit, 0)) <> (coalesce(d.debit, 0), coalesce(d.credit, 0))

-- name: status
select w.shard, w.incarnation, w.epoch, w.lsn, w.applied_at from oncepay.watermarks w order by w.shard

-- name: sizes
-- How many entries were booked, and about how many rows two tables have, as the last analyze knew.
select 'entries' as name, coalesce(sum(entries), 0)::bigint as rows from oncepay.kind_totals
union all
select c.relname, greatest(c.reltuples, 0)::bigint
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname = 'oncepay' and c.relkind = 'r' and c.relname in ('payments', 'seller_postings')
order by 1
