-- Payouts: what a run computes them from, and what the API shows of them.

-- name: upsert
-- The highest version stays; what the feed didn't repeat (null) stays too.
insert into oncepay.payouts as p (
    key, slot, seller, currency, sequence, status, version, amount, payee, ref_code, run, created_by, positions, progress,
    created_at, updated_at, shard, lsn)
select u.key, u.slot, u.seller, u.currency, u.sequence, u.status, u.version, u.amount, u.payee, u.ref_code, u.run, u.created_by,
       u.positions, u.progress, u.created_at, u.updated_at, $1, u.lsn
from unnest($2::text[], $3::integer[], $4::text[], $5::text[], $6::bigint[], $7::text[], $8::bigint[], $9::bigint[], $10::text[],
            $11::text[], $12::text[], $13::text[], $14::text[], $15::text[], $16::timestamptz[], $17::timestamptz[], $18::pg_lsn[])
     u (key, slot, seller, currency, sequence, status, version, amount, payee, ref_code, run, created_by, positions, progress,
        created_at, updated_at, lsn)
on conflict (seller, currency, sequence) do update set
    slot = excluded.slot, status = excluded.status, version = excluded.version,
    positions = coalesce(excluded.positions, p.positions), progress = coalesce(excluded.progress, p.progress),
    updated_at = excluded.updated_at, shard = excluded.shard, lsn = excluded.lsn
where excluded.version > p.version

-- name: owed
-- What each seller is owed, where that is anything. $1 a currency or null, $2 sellers or null, $3 since when money is still
-- pending (null: none is). `pending` is what payments since then brought and haven't lost again. `sequence` is the seller's last
-- payout in the currency (0: none), `held` whether its entry is among those that the balance was summed from. `missing` is the first
-- of the last 32 sequences that isn't there (0: all are): each is on a shard of its own, and a restore may have lost one.
with owed as (
    select substr(t.account, 8, length(t.account) - 15) as seller, t.currency, sum(t.credit - t.debit) as balance
    from oncepay.current_account_totals t
    where t.account like 'seller:%:payable' and ($1::text is null or t.currency = $1)
      and ($2::text[] is null or t.account = any (select 'seller:' || name || ':payable' from unnest($2::text[]) name))
    group by t.account, t.currency
    having sum(t.credit - t.debit) > 0
), of_payment as (
    select p.account, e.currency, e.key, -sum(p.amount) as amount
    from oncepay.entries e cross join lateral unnest(e.accounts, e.amounts) p (account, amount)
    where e.created_at >= $3::timestamptz and p.account like 'seller:%:payable' and ($1::text is null or e.currency = $1)
    group by p.account, e.currency, e.key
    having bool_or(e.kind = 'payment')
), fresh as (
    select substr(account, 8, length(account) - 15) as seller, currency, sum(greatest(amount, 0)) as pending
    from of_payment group by account, currency
)
select o.seller, o.currency, o.balance::bigint as balance, coalesce(f.pending, 0)::bigint as pending,
       coalesce(p.sequence, 0) as sequence, coalesce(p.held, true) as held, coalesce(gap.missing, 0) as missing
from owed o
left join fresh f on f.seller = o.seller and f.currency = o.currency
left join lateral (
    select p.sequence, exists (select from oncepay.entries e where e.key = p.key and e.entry_id = 'payout') as held
    from oncepay.payouts p where p.seller = o.seller and p.currency = o.currency
    order by p.sequence desc limit 1) p on true
left join lateral (
    select min(n) as missing from generate_series(greatest(p.sequence - 31, 1), p.sequence) n
    where (
            select count(*) from oncepay.payouts q
            where q.seller = o.seller and q.currency = o.currency and q.sequence > p.sequence - 32
          ) < least(p.sequence, 32)
      and not exists (
            select from oncepay.payouts q where q.seller = o.seller and q.currency = o.currency and q.sequence = n)) gap on true
order by o.seller, o.currency

-- name: list
-- Newest first; $5 and $6 are the last payout of the page before, or null. Filters: $1 seller, $2 currency, $3 status, $4 run.
select key, seller, currency, sequence, status, version, amount, payee, ref_code, run, created_by, positions, progress, created_at,
       updated_at
from oncepay.payouts
where ($1::text is null or seller = $1) and ($2::text is null or currency = $2) and ($3::text is null or status = $3)
  and ($4::text is null or run = $4) and ($5::timestamptz is null or (created_at, key) < ($5, $6::text))
order by created_at desc, key desc
limit $7

-- name: of_seller
-- As `list`, by the table's own order: no other seller's payouts are read.
select key, seller, currency, sequence, status, version, amount, payee, ref_code, run, created_by, positions, progress, created_at,
       updated_at
from oncepay.payouts
where seller = $1 and ($2::text is null or currency = $2) and ($3::timestamptz is null or (created_at, key) < ($3, $4::text))
order by created_at desc, key desc
limit $5
