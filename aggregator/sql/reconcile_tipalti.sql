-- Tipalti's payments and fundings against the payouts, and against what is posted on `tipalti:clearing`.

-- name: cursor
select cursor from oncepay.tipalti_reading where list = $1

-- name: keep_cursor
insert into oncepay.tipalti_reading (list, cursor) values ($1, $2)
on conflict (list) do update set cursor = excluded.cursor

-- name: keep_payments
-- Each as it is now. Tipalti's time counts where a payment is new, and isn't to come; else the one at which a change was first seen.
insert into oncepay.tipalti_payments as k
    (id, ref_code, status, currency, amount, fee, fee_currency, reason, created_at, changed_at)
select distinct on (u.id) u.id, u.ref_code, u.status, u.currency, u.amount, u.fee, u.fee_currency, u.reason,
       coalesce(t.created_at, least(u.created_at, n.now), n.now),
       case when t.id is null then coalesce(least(u.changed_at, n.now), n.now)
            when (t.status, t.amount, t.currency, t.fee, t.fee_currency) = (u.status, u.amount, u.currency, u.fee, u.fee_currency)
            then t.changed_at
            else n.now end
from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::text[], $8::text[],
            $9::timestamptz[], $10::timestamptz[])
     u (id, ref_code, status, currency, amount, fee, fee_currency, reason, created_at, changed_at)
cross join (select clock_timestamp() as now) n
left join oncepay.tipalti_payments t on t.id = u.id
on conflict (id) do update set
    ref_code = excluded.ref_code, status = excluded.status, currency = excluded.currency, amount = excluded.amount,
    fee = excluded.fee, fee_currency = excluded.fee_currency, reason = excluded.reason, created_at = excluded.created_at,
    changed_at = excluded.changed_at
where (k.ref_code, k.status, k.currency, k.amount, k.fee, k.fee_currency, k.reason)
    is distinct from (excluded.ref_code, excluded.status, excluded.currency, excluded.amount, excluded.fee, excluded.fee_currency,
                      excluded.reason)

-- name: keep_fundings
insert into oncepay.tipalti_fundings as k (id, currency, amount, created_at)
select distinct on (u.id) u.id, u.currency, u.amount, coalesce(least(u.created_at, clock_timestamp()), clock_timestamp())
from unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[]) u (id, currency, amount, created_at)
on conflict (id) do update set currency = excluded.currency, amount = excluded.amount
where (k.currency, k.amount) is distinct from (excluded.currency, excluded.amount)

-- name: open
-- Payments of payouts that may still change, after $1, $2 of them.
select distinct t.ref_code from oncepay.tipalti_payments t
where not t.final and t.ref_code > $1 and exists (select from oncepay.payouts p where p.ref_code = t.ref_code)
order by t.ref_code
limit $2

-- name: fundings_to_book
select f.id, f.currency, f.amount from oncepay.tipalti_fundings f
where f.created_at >= $1 and f.created_at < $2 and f.id > $3
  and not exists (select from oncepay.entry_rows e where e.key = 'tipalti:' || f.id)
order by f.id
limit $4

-- name: count_booked
select count(*) from unnest($1::text[]) u (id) where exists (select from oncepay.entry_rows e where e.key = 'tipalti:' || u.id)

-- name: payouts_of_a_time
-- Payouts that were made, changed (here or at Tipalti) or posted on in a time, after the key $3, $4 of them.
select key from (
    select p.key from oncepay.payouts p where p.created_at >= $1 and p.created_at < $2
    union
    select p.key from oncepay.payouts p where p.updated_at >= $1 and p.updated_at < $2
    union
    select p.key from oncepay.tipalti_payments t join oncepay.payouts p on p.ref_code = t.ref_code
    where t.changed_at >= $1 and t.changed_at < $2
    union
    select e.key from oncepay.entry_rows e
    where e.created_at >= $1 and e.created_at < $2 and 'tipalti:clearing' = any (e.accounts) and e.key like 'payout:%') k
where key > $3
order by key
limit $4

-- name: payouts_under_way
-- Payouts that aren't over, however old, after the key $1, $2 of them.
select p.key from oncepay.payouts p
where p.status not in ('cleared', 'rejected', 'returned', 'deferred', 'canceled', 'refused', 'declined') and p.key > $1
order by p.key
limit $2

-- name: payouts_that_differ
-- Of these payouts ($1), for each currency: what Tipalti's payments with the payout's reference code come to, and what is posted.
-- What changed at $2 or later may still be on its way. What Tipalti wasn't told of yet is worked on until $3: it is told again and again,
-- which changes the row each time.
select p.key, p.ref_code, t.payment, p.currency as of_currency, d.currency, d.wanted::bigint as expected, d.posted::bigint as actual,
       p.status, t.statuses,
       case when t.standing > 1 then 'paid_twice'
            when t.payments = 0 and p.by_hand then 'payout_net_differs'
            when t.payments = 0 then 'payout_not_at_tipalti'
            when t.otherwise then 'payout_differs'
            else 'payout_net_differs' end as kind
from (
    select p.*, coalesce(p.progress::jsonb ->> 'reference', '') <> '' as by_hand,
           coalesce((p.progress::jsonb ->> 'sends')::bigint, 0) as sends
    from oncepay.payouts p where p.key = any ($1::text[])) p
cross join lateral (
    select count(*) as payments, min(t.id) as payment, string_agg(t.status, ', ' order by t.id) as statuses,
           count(*) filter (where not t.given_back) as standing,
           bool_or(t.amount <> p.amount or t.currency <> p.currency) as otherwise, max(t.changed_at) as changed_at
    from oncepay.tipalti_payments t where t.ref_code = p.ref_code) t
left join lateral (
    select c.currency, sum(c.wanted) as wanted, sum(c.posted) as posted
    from (
        select t.currency, case when t.given_back then 0 else -t.amount end as wanted, 0 as posted
        from oncepay.tipalti_payments t where t.ref_code = p.ref_code
        union all
        select t.fee_currency, -t.fee, 0 from oncepay.tipalti_payments t where t.ref_code = p.ref_code and t.fee <> 0
        union all
        select p.currency, -p.amount, 0
        where t.payments = 0 and not p.by_hand and p.status in ('awaiting_approval', 'created', 'submitting')
        union all
        select e.currency, 0, x.amount
        from (select * from oncepay.entries e where e.key = p.key offset 0) e
        cross join lateral unnest(e.accounts, e.amounts) x (account, amount)
        where x.account = 'tipalti:clearing') c
    group by c.currency
    having sum(c.wanted) <> sum(c.posted)) d on true
where case when t.payments = 0 and p.status = 'submitting' and p.sends > 1 then p.created_at < $3::timestamptz
           when t.payments = 0 and p.status in ('created', 'submitting') then p.updated_at < $3::timestamptz
           else greatest(p.updated_at, t.changed_at) < $2::timestamptz end
  and (d.currency is not null or t.standing > 1 or t.otherwise
       or t.payments = 0 and not p.by_hand and p.status not in ('awaiting_approval', 'refused', 'declined'))
order by p.key, d.currency

-- name: differ
-- Once: a payout is of several times.
insert into oncepay.reconciliation_differences
    (run, kind, transaction, key, source, category, currency, expected, actual, detail)
select $1, $2, $3, $4, $5, $6, $7, $8::bigint, $9::bigint, $10
where not exists (
    select from oncepay.reconciliation_differences d
    where d.run = $1 and d.kind = $2 and (d.key, d.transaction, d.currency) is not distinct from ($4, $3, $7))

-- name: count_payments
select count(*) from oncepay.tipalti_payments
where created_at >= $1 and created_at < $2 or changed_at >= $1 and changed_at < $2

-- name: count_fundings
select count(*) from oncepay.tipalti_fundings where created_at >= $1 and created_at < $2

-- name: count_waiting
-- Payouts that wait for an operator: their money is posted, and Tipalti was told nothing.
select count(*) from oncepay.payouts where status = 'awaiting_approval'

-- name: without_payout
-- Payments that no payout here has ordered, after the id $3, $4 of them.
select t.id, t.ref_code, t.currency, t.amount, t.given_back, t.status
from oncepay.tipalti_payments t
where t.created_at >= $1 and t.created_at < $2 and t.id > $3
  and not exists (select from oncepay.payouts p where p.ref_code = t.ref_code)
order by t.id
limit $4

-- name: fundings_that_differ
insert into oncepay.reconciliation_differences (run, kind, transaction, key, category, currency, expected, actual)
select $1, case when p.entries = 0 then 'funding_not_booked' else 'funding_differs' end, f.id, 'tipalti:' || f.id, 'funding',
       c.currency, case when c.currency = f.currency then f.amount else 0 end, c.posted::bigint
from oncepay.tipalti_fundings f
cross join lateral (
    select count(*) as entries from oncepay.entry_rows e where e.key = 'tipalti:' || f.id) p
cross join lateral (
    select a.currency, sum(a.amount) as posted
    from (
        select f.currency, 0 as amount
        union all
        select e.currency, x.amount
        from (select * from oncepay.entries e where e.key = 'tipalti:' || f.id offset 0) e
        cross join lateral unnest(e.accounts, e.amounts) x (account, amount)
        where x.account = 'tipalti:clearing') a
    group by a.currency) c
where f.created_at >= $2 and f.created_at < least($3::timestamptz, $4::timestamptz)
  and c.posted <> case when c.currency = f.currency then f.amount else 0 end
order by f.id

-- name: of_nothing_at_tipalti
-- What is posted on Tipalti's clearing account and is neither a payout's nor a funding's that Tipalti has.
insert into oncepay.reconciliation_differences (run, kind, key, entry_id, category, currency, expected, actual)
select $1, case when e.key like 'tipalti:%' then 'funding_not_at_tipalti' else 'posted_without_payout' end, e.key, e.entry_id, e.kind,
       e.currency, 0, x.amount::bigint
from oncepay.entry_rows e
cross join lateral (
    select sum(x.amount) as amount from unnest(e.accounts, e.amounts) x (account, amount) where x.account = 'tipalti:clearing') x
where e.created_at >= $2 and e.created_at < least($3::timestamptz, $4::timestamptz)
  and 'tipalti:clearing' = any (e.accounts)
  and case when e.key like 'tipalti:%' then not exists (select from oncepay.tipalti_fundings f where f.id = substr(e.key, 9))
           else not exists (select from oncepay.payouts p where p.key = e.key) end
order by e.key
