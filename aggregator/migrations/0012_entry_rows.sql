-- Entries and links as the shards keep them (oncepay/entry_rows.py): what one commit books of a charge is one row, with the
-- balance transaction that it is linked to and Stripe's fee. Rows from before stay as they are; `entries` and `balance_links` show
-- all of them as they were booked.

alter table oncepay.entries rename to entry_rows;
alter table oncepay.balance_links rename to link_rows;

-- Without `source` it is in the id (`kind:source`); without `sellers` the accounts are coded. `fee` is an entry
-- `stripe_fee:<balance_transaction>` of its own.
alter table oncepay.entry_rows
    alter column source drop not null,
    alter column sellers drop not null,
    add column balance_transaction text,
    add column fee bigint;
create index entry_rows_transaction on oncepay.entry_rows (balance_transaction) where balance_transaction is not null;

create function oncepay.decoded_account(code text) returns text
    language sql immutable parallel safe
    return case left(code, 1)
        when 'C' then 'stripe:clearing'
        when 'P' then 'seller:' || substr(code, 2) || ':payable'
        when 'F' then 'platform:fees'
        when 'E' then 'stripe:fees'
        when 'H' then 'refunds:held'
        when 'X' then 'fx:' || substr(code, 2)
    end;
create function oncepay.decoded_seller(code text) returns text
    language sql immutable parallel safe
    return case when left(code, 1) in ('P', 'F') then substr(code, 2) else '' end;

create view oncepay.entries as
select key, entry_id, slot, kind, currency, coalesce(source, substr(entry_id, strpos(entry_id, ':') + 1)) as source,
       case when sellers is null
            then array(select oncepay.decoded_account(c) from unnest(accounts) with ordinality u (c, n) order by n)
            else accounts end as accounts,
       amounts,
       case when sellers is null
            then array(select oncepay.decoded_seller(c) from unnest(accounts) with ordinality u (c, n) order by n)
            else sellers end as sellers,
       created_at, shard, lsn
from oncepay.entry_rows
union all
select key, 'stripe_fee:' || balance_transaction, slot, 'stripe_fee', currency, balance_transaction,
       array['stripe:fees', 'stripe:clearing'], array[fee, -fee], array['', ''], created_at, shard, lsn
from oncepay.entry_rows where fee is not null;

create view oncepay.balance_links as
select balance_transaction, key, entry_id, slot, created_at, shard, lsn from oncepay.link_rows
union all
select balance_transaction, key, entry_id, slot, created_at, shard, lsn
from oncepay.entry_rows where balance_transaction is not null
union all
select balance_transaction, key, 'stripe_fee:' || balance_transaction, slot, created_at, shard, lsn
from oncepay.entry_rows where fee is not null;

grant select on oncepay.entries, oncepay.balance_links to oncepay_aggregator, oncepay_reader;
revoke execute on function oncepay.decoded_account, oncepay.decoded_seller from public;
grant execute on function oncepay.decoded_account, oncepay.decoded_seller to oncepay_aggregator, oncepay_reader;

-- As in 0011, by the tables' new names.
create or replace function oncepay.forget_slots(p_shard text, p_slots int4multirange) returns setof text
    language plpgsql volatile security definer set search_path = pg_catalog as $$
declare
    affected text[];
begin
    affected := array(
        select p_shard union select distinct shard from oncepay.entry_rows where slot <@ p_slots order by 1);
    perform from oncepay.watermarks where shard = any (affected) order by shard for update;
    delete from oncepay.link_rows where slot <@ p_slots;
    delete from oncepay.entry_rows where slot <@ p_slots;
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
    from oncepay.entry_rows e
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
