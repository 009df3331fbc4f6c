-- Statements, revenue in any time zone, what is still pending, profit, and the books at an earlier position.

-- What an entry did to each seller that it names: `amount` is the change of what the seller is owed, `total` that change before
-- the platform's fee, `fee` the platform's part. A posting on a seller's account counts also where it names nobody.
create function oncepay.by_seller(accounts text[], amounts bigint[], sellers text[])
    returns table (seller text, amount bigint, total bigint, fee bigint)
    language sql immutable parallel safe as $$
    select n.name,
           coalesce(-sum(p.amount) filter (where p.account = case n.name when 'platform' then 'platform:fees'
                                                             else 'seller:' || n.name || ':payable' end), 0)::bigint,
           coalesce(-sum(p.amount) filter (where p.seller <> ''), 0)::bigint,
           coalesce(-sum(p.amount) filter (where p.account = 'platform:fees' and p.seller not in ('', 'platform')), 0)::bigint
    from unnest(accounts, amounts, sellers) p (account, amount, seller)
    cross join lateral (
        select case when p.seller <> '' then p.seller
                    when p.account like 'seller:%:payable' then substr(p.account, 8, length(p.account) - 15) end as name) n
    where n.name is not null
    group by n.name
$$;
revoke execute on function oncepay.by_seller from public;

-- A row for each entry and each seller that it names, in the order of the seller's statement.
create table oncepay.seller_postings (
    seller text not null,
    currency text not null,
    created_at timestamptz not null,
    key text not null,
    entry_id text not null,
    slot integer not null,
    kind text not null,
    amount bigint not null,
    total bigint not null,
    fee bigint not null,
    primary key (seller, currency, created_at, key, entry_id)
);
insert into oncepay.seller_postings (seller, currency, created_at, key, entry_id, slot, kind, amount, total, fee)
select b.seller, e.currency, e.created_at, e.key, e.entry_id, e.slot, e.kind, b.amount, b.total, b.fee
from oncepay.entries e cross join lateral oncepay.by_seller(e.accounts, e.amounts, e.sellers) b;

-- The accounts' movements by UTC day and kind of entry; all sellers' accounts are one, `seller:*:payable`.
create table oncepay.account_days (
    account text not null,
    currency text not null,
    day date not null,
    kind text not null,
    shard text not null,
    debit numeric not null check (debit >= 0),
    credit numeric not null check (credit >= 0),
    primary key (account, currency, day, kind, shard)
) with (fillfactor = 70);
insert into oncepay.account_days (account, currency, day, kind, shard, debit, credit)
select case when p.account like 'seller:%:payable' then 'seller:*:payable' else p.account end, e.currency,
       (e.created_at at time zone 'UTC')::date, e.kind, e.shard,
       coalesce(sum(p.amount) filter (where p.amount > 0), 0), coalesce(-sum(p.amount) filter (where p.amount < 0), 0)
from oncepay.entries e cross join lateral unnest(e.accounts, e.amounts) p (account, amount)
group by 1, 2, 3, 4, 5;

-- Small indexes for what is asked by position or by time: entries come nearly in both orders.
create index entries_lsn on oncepay.entries using brin (lsn pg_lsn_minmax_multi_ops);
create index entries_created on oncepay.entries using brin (created_at timestamptz_minmax_multi_ops);

grant select on oncepay.seller_postings, oncepay.account_days to oncepay_aggregator, oncepay_reader;
grant insert on oncepay.seller_postings to oncepay_aggregator;
grant insert, update on oncepay.account_days to oncepay_aggregator;
grant execute on function oncepay.by_seller to oncepay_aggregator, oncepay_reader;

-- As in 0004, with the tables of this migration.
create or replace function oncepay.forget_slots(p_shard text, p_slots int4multirange) returns setof text
    language plpgsql volatile security definer set search_path = pg_catalog as $$
declare
    affected text[];
begin
    affected := array(
        select p_shard union select distinct shard from oncepay.entries where slot <@ p_slots order by 1);
    perform from oncepay.watermarks where shard = any (affected) order by shard for update;
    delete from oncepay.balance_links where slot <@ p_slots;
    delete from oncepay.entries where slot <@ p_slots;
    delete from oncepay.seller_postings where slot <@ p_slots;
    delete from oncepay.payments where slot <@ p_slots;
    delete from oncepay.seller_days where shard = any (affected);
    delete from oncepay.account_totals where shard = any (affected);
    delete from oncepay.account_days where shard = any (affected);
    delete from oncepay.kind_totals where shard = any (affected);
    return query select unnest(affected);
end $$;
