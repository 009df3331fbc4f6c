-- Sellers' sums may be behind: while a shard catches up, its postings are open, and are added to seller_days and account_totals many
-- batches at a time. Whoever reads sums adds the open postings.

-- Open are the shard's postings after `summed_lsn`; null `open_since`: none is. `open_since` is the earliest of their times,
-- `open_postings` how many there are, `open_of_one` at least as many as any one seller has of them.
alter table oncepay.watermarks
    add column summed_lsn pg_lsn,
    add column open_since timestamptz,
    add column open_postings bigint not null default 0,
    add column open_of_one bigint not null default 0;

-- `debit` and `credit` are those of the seller's own account (null: no posting was on it); `named`: the entry names the seller.
-- Rows from before this migration have no shard, and are never open.
alter table oncepay.seller_postings
    add column shard text,
    add column lsn pg_lsn,
    add column debit bigint,
    add column credit bigint,
    add column named boolean not null default true;
create index seller_postings_lsn on oncepay.seller_postings using brin (lsn pg_lsn_minmax_multi_ops) with (autosummarize = on);

-- What each posting adds to a seller's day and account, as `fold` (fold.py) has it: the one place in SQL.
create view oncepay.seller_movements as
select c.shard, c.lsn, c.seller, c.currency, c.created_at, (c.created_at at time zone 'UTC')::date as day, c.counts,
       case when c.counts and c.category = 'payment' then 1 else 0 end as payments,
       case when c.counts and c.category = 'payment' then c.total else 0 end as gross,
       case when c.counts and c.category = 'refund' then -c.total else 0 end as refunded,
       case when c.counts and c.category = 'dispute' then -c.total else 0 end as disputed,
       case when c.counts then c.fee else 0 end as fees, c.debit, c.credit
from (
    select p.*, k.category, p.named and k.category in ('payment', 'refund', 'dispute') as counts
    from oncepay.seller_postings p
    cross join lateral (select split_part(p.kind, '_', 1) as category) k) c;

-- The open ones, of one seller or (null) of all. A function, so that nothing is read where none is open.
create function oncepay.open_movements(p_seller text) returns setof oncepay.seller_movements
    language plpgsql stable as $$
declare
    behind record;
begin
    for behind in select shard, summed_lsn, open_since from oncepay.watermarks where open_since is not null loop
        if p_seller is null then
            return query select * from oncepay.seller_movements m where m.shard = behind.shard and m.lsn > behind.summed_lsn;
        else
            return query select * from oncepay.seller_movements m
                where m.seller = p_seller and m.created_at >= behind.open_since and m.shard = behind.shard and m.lsn > behind.summed_lsn;
        end if;
    end loop;
end $$;

-- One seller's days, and its account, as of the watermarks; to be added up.
create function oncepay.days_of(p_seller text)
    returns table (currency text, day date, payments bigint, gross bigint, refunded bigint, disputed bigint, fees bigint, net bigint)
    language sql stable as $$
    select currency, day, payments, gross, refunded, disputed, fees, net from oncepay.seller_days where seller = p_seller
    union all
    select currency, day, payments, gross, refunded, disputed, fees, gross - refunded - disputed - fees
    from oncepay.open_movements(p_seller) where counts
$$;

create function oncepay.account_of(p_seller text) returns table (currency text, debit numeric, credit numeric)
    language sql stable as $$
    select currency, debit, credit from oncepay.account_totals where account = 'seller:' || p_seller || ':payable'
    union all
    select currency, debit, credit from oncepay.open_movements(p_seller) where debit is not null
$$;

-- All sellers' days, and all accounts, as of the watermarks; to be added up.
create view oncepay.current_seller_days as
select seller, currency, day, shard, payments, gross, refunded, disputed, fees, net from oncepay.seller_days
union all
select seller, currency, day, shard, sum(payments), sum(gross), sum(refunded), sum(disputed), sum(fees),
       sum(gross - refunded - disputed - fees)
from oncepay.open_movements(null) where counts
group by seller, currency, day, shard;

create view oncepay.current_account_totals as
select account, currency, shard, debit, credit from oncepay.account_totals
union all
select 'seller:' || seller || ':payable', currency, shard, sum(debit), sum(credit)
from oncepay.open_movements(null) where debit is not null
group by seller, currency, shard;

grant select on oncepay.seller_movements, oncepay.current_seller_days, oncepay.current_account_totals
    to oncepay_aggregator, oncepay_reader;
revoke execute on function oncepay.open_movements, oncepay.days_of, oncepay.account_of from public;
grant execute on function oncepay.open_movements, oncepay.days_of, oncepay.account_of to oncepay_aggregator, oncepay_reader;

-- As in 0006. Nothing of the affected shards is open then; postings from before this migration get what their sums are made of, and
-- those that are left of the shard count as before any position.
drop function oncepay.forget_slots;
create function oncepay.forget_slots(p_shard text, p_slots int4multirange) returns setof text
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
    update oncepay.watermarks set open_since = null, open_postings = 0, open_of_one = 0
    where shard = any (affected) and open_since is not null;
    update oncepay.seller_postings set lsn = '0/0' where shard = p_shard and lsn > '0/0';
    update oncepay.seller_postings s
    set shard = e.shard, lsn = '0/0', debit = a.debit, credit = a.credit, named = a.named
    from oncepay.entries e
    cross join lateral (
        select n.name,
               sum(greatest(p.amount, 0)) filter (where p.account = 'seller:' || n.name || ':payable')::bigint as debit,
               sum(greatest(-p.amount, 0)) filter (where p.account = 'seller:' || n.name || ':payable')::bigint as credit,
               bool_or(p.seller = n.name) as named
        from unnest(e.accounts, e.amounts, e.sellers) p (account, amount, seller)
        cross join lateral (
            select distinct x.name from (values (p.seller), (case when p.account like 'seller:%:payable'
                                                                  then substr(p.account, 8, length(p.account) - 15) end)) x (name)
            where x.name <> '') n
        group by n.name) a
    where s.shard is null and e.shard = any (affected) and e.key = s.key and e.entry_id = s.entry_id and a.name = s.seller;
    return query select unnest(affected);
end $$;
revoke execute on function oncepay.forget_slots from public;
grant execute on function oncepay.forget_slots to oncepay_aggregator;
