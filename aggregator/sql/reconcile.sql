-- Stripe's balance transactions against the entries that are linked to them, one span of time after the other. Most links are in their
-- entries' rows, with Stripe's fee: what has millions of rows asks the tables, what has few the views `entries` and `balance_links`.

-- name: begin
insert into oncepay.reconciliations (id, first, last, asked_by, state) values ($1, $2, $3, $4, 'running')

-- name: end
update oncepay.reconciliations
set state = $2, ended_at = clock_timestamp(), checked = $3::jsonb, problem = $4,
    differences = (select count(*) from oncepay.reconciliation_differences where run = $1)
where id = $1

-- name: note_progress
update oncepay.reconciliations set checked = $2::jsonb where id = $1

-- name: any_running
select exists (select from oncepay.reconciliations where state = 'running')

-- name: abandon
-- Runs whose process or session died: nobody else holds the lock. With $1 only that one.
update oncepay.reconciliations set state = 'failed', ended_at = clock_timestamp(), problem = $2
where state = 'running' and id = coalesce($1, id)

-- name: keep
insert into oncepay.stripe_transactions as t (id, type, category, currency, amount, fee, net, source, created_at)
select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::bigint[], $8::text[],
                     $9::timestamptz[])
on conflict (id) do update set
    type = excluded.type, category = excluded.category, currency = excluded.currency, amount = excluded.amount,
    fee = excluded.fee, net = excluded.net, source = excluded.source, created_at = excluded.created_at
where (t.type, t.category, t.currency, t.amount, t.fee, t.net, t.source, t.created_at)
    is distinct from (excluded.type, excluded.category, excluded.currency, excluded.amount, excluded.fee, excluded.net,
                      excluded.source, excluded.created_at)

-- name: to_book
-- What no payment caused and nothing is linked to yet. $3: the categories that payments cause.
select t.id, t.currency, t.amount, t.fee, t.category
from oncepay.stripe_transactions t
where t.created_at >= $1 and t.created_at < $2 and not t.category = any ($3::text[])
  and (t.amount <> 0 or t.fee <> 0)
  and not exists (select from oncepay.entry_rows e where e.balance_transaction = t.id)
  and not exists (select from oncepay.link_rows l where l.balance_transaction = t.id)
order by t.id
limit $4

-- name: count_linked
select count(*) from unnest($1::text[]) u (id)
where exists (select from oncepay.entry_rows e where e.balance_transaction = u.id)
   or exists (select from oncepay.link_rows l where l.balance_transaction = u.id)

-- name: count_transactions
select count(*) from oncepay.stripe_transactions where created_at >= $1 and created_at < $2

-- name: join_in_memory
-- Most of what is compared here is a join of a span with all links.
set local work_mem = '64MB'

-- name: unbooked
-- Money moved at Stripe and nothing is linked to it; what came after $4 may still be on its way.
insert into oncepay.reconciliation_differences (run, kind, transaction, source, category, currency, expected, actual)
select $1, 'unbooked', t.id, t.source, t.category, t.currency, t.net, 0
from oncepay.stripe_transactions t
where t.created_at >= $2 and t.created_at < least($3::timestamptz, $4::timestamptz) and (t.net <> 0 or t.fee <> 0)
  and not exists (select from oncepay.entry_rows e where e.balance_transaction = t.id)
  and not exists (select from oncepay.link_rows l where l.balance_transaction = t.id)

-- name: net_differs
-- In the transaction's own currency the postings come to its net, in every other one (an exchange) to nothing. A fee in a row is an
-- entry of its own, linked to the same transaction.
insert into oncepay.reconciliation_differences (run, kind, transaction, key, source, category, currency, expected, actual)
select $1, 'net_differs', s.id, s.key, s.source, s.category, s.currency, s.expected, s.actual
from (
    select t.id, t.source, t.category, p.currency, case when p.currency = t.currency then t.net else 0 end as expected,
           p.amount::bigint as actual, p.key
    from oncepay.stripe_transactions t
    cross join lateral (
        select a.currency, sum(a.amount) as amount, min(a.key) as key
        from (
            select e.currency, e.key, coalesce(x.amount, 0) - coalesce(e.fee, 0) as amount
            from oncepay.entry_rows e
            cross join lateral (
                select sum(x.amount) as amount from unnest(e.accounts, e.amounts) x (account, amount)
                where x.account in ('C', 'stripe:clearing')) x
            where e.balance_transaction = t.id and (x.amount is not null or e.fee is not null)
            union all
            select e.currency, e.key, x.amount
            from oncepay.link_rows l
            cross join lateral (select * from oncepay.entries e where e.key = l.key and e.entry_id = l.entry_id offset 0) e
            cross join lateral unnest(e.accounts, e.amounts) x (account, amount)
            where l.balance_transaction = t.id and x.account = 'stripe:clearing') a
        group by a.currency) p
    where t.created_at >= $2 and t.created_at < $3) s
where s.actual <> s.expected

-- name: net_missing
-- Linked, and yet nothing was posted in the transaction's own currency.
insert into oncepay.reconciliation_differences (run, kind, transaction, key, source, category, currency, expected, actual)
select $1, 'net_differs', t.id, p.key, t.source, t.category, t.currency, t.net, 0
from oncepay.stripe_transactions t
cross join lateral (
    select min(a.key) as key, bool_or(a.currency = t.currency) as posted
    from (
        select e.key, e.currency from oncepay.entry_rows e where e.balance_transaction = t.id
        union all
        select e.key, e.currency
        from oncepay.link_rows l
        cross join lateral (select * from oncepay.entries e where e.key = l.key and e.entry_id = l.entry_id offset 0) e
        where l.balance_transaction = t.id) a) p
where t.created_at >= $2 and t.created_at < $3 and t.net <> 0 and not p.posted

-- name: of_several
insert into oncepay.reconciliation_differences (run, kind, transaction, key, source, category, currency, detail)
select $1, 'of_several', t.id, p.key, t.source, t.category, t.currency, p.keys
from oncepay.stripe_transactions t
cross join lateral (
    select min(a.key) as key, string_agg(distinct a.key, ', ') as keys, count(distinct a.key) as count
    from (
        select e.key from oncepay.entry_rows e where e.balance_transaction = t.id
        union all
        select l.key from oncepay.link_rows l where l.balance_transaction = t.id) a) p
where t.created_at >= $2 and t.created_at < $3 and p.count > 1

-- name: unlinked
-- Entries on the clearing account that no balance transaction belongs to.
insert into oncepay.reconciliation_differences (run, kind, key, entry_id, source, category, currency, expected, actual)
select $1, 'unlinked', e.key, e.entry_id, coalesce(e.source, substr(e.entry_id, strpos(e.entry_id, ':') + 1)), e.kind, e.currency, 0,
       x.amount
from oncepay.entry_rows e
cross join lateral (
    select sum(x.amount) as amount from unnest(e.accounts, e.amounts) x (account, amount)
    where x.account in ('C', 'stripe:clearing')) x
where e.created_at >= $2 and e.created_at < least($3::timestamptz, $4::timestamptz) and e.balance_transaction is null
  and x.amount is not null
  and not exists (select from oncepay.link_rows l where l.key = e.key and l.entry_id = e.entry_id)

-- name: linked_twice
-- Of two links one at least is not in the entry's row.
insert into oncepay.reconciliation_differences (run, kind, key, entry_id, source, category, currency, detail)
select $1, 'linked_twice', e.key, e.entry_id, e.source, e.kind, e.currency,
       concat_ws(', ', e.transaction, string_agg(l.balance_transaction, ', ' order by l.balance_transaction))
from (
    select key, entry_id, coalesce(source, substr(entry_id, strpos(entry_id, ':') + 1)) as source, kind, currency,
           balance_transaction as transaction
    from oncepay.entry_rows
    where created_at >= $2 and created_at < $3
    union all
    select key, 'stripe_fee:' || balance_transaction, balance_transaction, 'stripe_fee', currency, balance_transaction
    from oncepay.entry_rows
    where created_at >= $2 and created_at < $3 and fee is not null) e
join oncepay.link_rows l on l.key = e.key and l.entry_id = e.entry_id
group by e.key, e.entry_id, e.source, e.kind, e.currency, e.transaction
having count(*) + count(distinct e.transaction) > 1

-- name: not_in_copy
-- Linked transactions that Stripe's list didn't bring: of another time, or not there at all.
select l.balance_transaction, min(l.key) as key, min(l.entry_id) as entry_id
from (
    select e.balance_transaction, e.key, e.entry_id from oncepay.entry_rows e
    where e.created_at >= $1 and e.created_at < $2 and e.balance_transaction is not null
      and not exists (select from oncepay.stripe_transactions t where t.id = e.balance_transaction)
    union all
    select l.balance_transaction, l.key, l.entry_id from oncepay.link_rows l
    where l.created_at >= $1 and l.created_at < $2
      and not exists (select from oncepay.stripe_transactions t where t.id = l.balance_transaction)) l
group by l.balance_transaction
order by l.balance_transaction
limit $3

-- name: differ
insert into oncepay.reconciliation_differences
    (run, kind, transaction, key, entry_id, source, category, currency, expected, actual, detail)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)

-- name: transaction
select amount, net, currency from oncepay.stripe_transactions where id = $1

-- name: to_explain
-- Charges that nothing is linked to: which payment are they of?
select n, source from oncepay.reconciliation_differences
where run = $1 and kind = 'unbooked' and source like any (array['ch\_%', 'py\_%'])
order by n
limit $2

-- name: explain
update oncepay.reconciliation_differences set kind = $3, key = $4, detail = $5 where run = $1 and n = $2

-- name: runs
select id, first, last, asked_by, state, started_at, ended_at, checked::text, differences, problem
from oncepay.reconciliations
where ($1::text is null or id = $1)
order by started_at desc
limit $2

-- name: differences
select n, kind, transaction, key, entry_id as entry, source, category, currency, expected as expected_minor,
       actual as actual_minor, detail
from oncepay.reconciliation_differences
where run = $1 and n > $2
order by n
limit $3

-- name: kinds
select kind, count(*) as count from oncepay.reconciliation_differences where run = $1 group by kind order by kind

-- name: last_daily
-- How far the daily runs have come, and whether there is anything before $1 to reconcile.
select (select max(last) from oncepay.reconciliations where asked_by = 'daily' and state = 'done') as done_to,
       exists (select from oncepay.entries where created_at < $1) as anything

-- name: last_done
select ended_at, differences from oncepay.reconciliations where state = 'done' order by ended_at desc limit 1
