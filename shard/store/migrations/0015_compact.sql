-- Less of the disk for each settled payment (docs/decisions/0100). The logical entries and links stay as they were; how they are kept
-- changes for what is written from now on, and `ledger` and `transaction_links` show old and new rows alike.

-- A payment's terms and progress as short JSON arrays (oncepay/payment_text.py); the older columns stay for the rows that have them.
alter table oncepay.payments
    alter column terms drop not null,
    alter column progress drop not null,
    add column agreed text,
    add column course text,
    add constraint payments_has_terms check (num_nulls(agreed, terms) = 1) not valid,
    add constraint payments_has_progress check (num_nulls(course, progress) = 1) not valid;
-- Each version of a row is on a page of its own time anyway: the columns that change are indexed. Vacuum makes room for new rows.
alter table oncepay.payments set (fillfactor = 100);

-- An entry without a `kind` has its id for one, and one without a `source` has both in its id (`kind:source`). Without `sellers` its
-- accounts are coded (account_of). `balance_transaction` is the link of an entry whose transaction was known when it was booked;
-- `fee` is Stripe's fee in it, as an entry `stripe_fee:<balance_transaction>` of its own would say it.
alter table oncepay.entries
    alter column kind drop not null,
    alter column source drop not null,
    alter column sellers drop not null,
    add column balance_transaction text,
    add column fee bigint,
    add constraint entries_id_says_all check (source is not null or kind is null and strpos(entry_id, ':') > 1) not valid,
    add constraint entries_fee_has_transaction
        check (fee is null or balance_transaction is not null and fee <> 0 and fee > -9223372036854775808) not valid;

create function oncepay.account_of(code text) returns text
    language sql immutable parallel safe
    return case left(code, 1)
        when 'C' then 'stripe:clearing'
        when 'P' then 'seller:' || substr(code, 2) || ':payable'
        when 'F' then 'platform:fees'
        when 'E' then 'stripe:fees'
        when 'H' then 'refunds:held'
        when 'X' then 'fx:' || substr(code, 2)
    end;
create function oncepay.seller_of(code text) returns text
    language sql immutable parallel safe
    return case when left(code, 1) in ('P', 'F') then substr(code, 2) else '' end;

create function oncepay.are_codes(accounts text[]) returns boolean language plpgsql immutable strict parallel safe as $$
declare
    code text;
begin
    foreach code in array accounts loop
        if code not in ('C', 'E', 'H') and left(code, 1) not in ('P', 'F', 'X') then
            return false;
        end if;
    end loop;
    return true;
end $$;
alter table oncepay.entries
    add constraint entries_accounts_are_known check (sellers is not null or oncepay.are_codes(accounts)) not valid;

create view oncepay.ledger as
select slot, key, entry_id,
       case when source is null then split_part(entry_id, ':', 1) else coalesce(kind, entry_id) end as kind, currency,
       coalesce(source, substr(entry_id, strpos(entry_id, ':') + 1)) as source,
       case when sellers is null
            then array(select oncepay.account_of(c) from unnest(accounts) with ordinality u (c, n) order by n)
            else accounts end as accounts,
       amounts,
       case when sellers is null
            then array(select oncepay.seller_of(c) from unnest(accounts) with ordinality u (c, n) order by n)
            else sellers end as sellers,
       created_at
from oncepay.entries
union all
select slot, key, 'stripe_fee:' || balance_transaction, 'stripe_fee', currency, balance_transaction,
       array['stripe:fees', 'stripe:clearing'], array[fee, -fee], array['', ''], created_at
from oncepay.entries where fee is not null;

create view oncepay.transaction_links as
select slot, key, entry_id, balance_transaction, created_at from oncepay.balance_links
union all
select slot, key, entry_id, balance_transaction, created_at from oncepay.entries where balance_transaction is not null
union all
select slot, key, 'stripe_fee:' || balance_transaction, balance_transaction, created_at from oncepay.entries where fee is not null;

grant select on oncepay.ledger, oncepay.transaction_links
    to oncepay_router, oncepay_worker, oncepay_aggregator, oncepay_operator, oncepay_reader;
revoke execute on function oncepay.account_of, oncepay.seller_of, oncepay.are_codes from public;
grant execute on function oncepay.account_of, oncepay.seller_of, oncepay.are_codes
    to oncepay_router, oncepay_worker, oncepay_aggregator, oncepay_operator, oncepay_reader;

-- The batch of 0007. New rows and changes come as arrays of their own, so that neither carries the other's columns; moments are
-- milliseconds since 1970.
drop function oncepay.commit_batch;
create function oncepay.commit_batch(
    p_ranges integer[],      -- first slots of the ranges touched, ascending
    p_epoch bigint,          -- the worker's epoch, or null for who needs none
    p_actor text,
    p_nonce text,
    -- new rows, ascending by (slot, key), each key once
    n_slot integer[], n_key text[], n_status text[], n_open boolean[], n_event text[], n_buyer text[], n_currency text[],
    n_amount bigint[], n_fingerprint bytea[], n_agreed text[], n_course text[], n_created bigint[], n_expires bigint[],
    -- changes, ascending by (slot, key), each key once and none that is new
    p_slot integer[], p_key text[], p_expect bigint[], p_status text[], p_intent text[], p_course text[],
    p_captured bigint[], p_refunded bigint[], p_open boolean[], p_disputed boolean[], p_event text[], p_updated bigint[],
    -- entries of the changes: `put` is the change's ordinal; arrays as array literals
    e_put integer[], e_id text[], e_kind text[], e_currency text[], e_source text[],
    e_accounts text[], e_amounts text[], e_sellers text[], e_transaction text[], e_fee bigint[],
    l_put integer[], l_entry text[], l_transaction text[],
    -- reads
    g_slot integer[], g_key text[], g_entries boolean[], g_intent text[]
) returns setof oncepay.answer
    language plpgsql volatile as $$
declare
    epoch_zero constant timestamptz := '1970-01-01 00:00:00+00';
    ms constant interval := '1 millisecond';
    first_slot integer;
    moved integer[] := '{}';
    done integer[] := '{}';
    wanted integer[];
    added text[];
begin
    foreach first_slot in array p_ranges loop
        perform pg_advisory_xact_lock_shared(1, first_slot);
    end loop;
    if p_epoch is not null then
        perform pg_advisory_xact_lock_shared(2, 0);
        if not exists (select from oncepay.worker_epoch where epoch = p_epoch) then
            raise exception 'epoch % is over', p_epoch using errcode = 'OP001';
        end if;
    end if;

    -- Every batch inserts before it changes: it waits for another's insert only while it holds no row that is changed.
    if cardinality(n_slot) > 0 then
        select coalesce(array_agg(u.n), '{}') into moved
        from unnest(n_slot) with ordinality u (slot, n)
        where not exists (
            select from oncepay.ranges r
            where r.first = any (p_ranges) and u.slot between r.first and r.last);
        with written as (
            insert into oncepay.payments as p (
                slot, key, status, version, buyer, currency, amount, fingerprint, agreed, course, open_work, event, actor,
                created_at, updated_at, expires_at)
            select u.slot, u.key, u.status, 1, u.buyer, u.currency, u.amount, u.fingerprint, u.agreed, u.course, u.open, u.event,
                   p_actor, epoch_zero + u.created * ms, epoch_zero + u.created * ms, epoch_zero + u.expires * ms
            from unnest(n_slot, n_key, n_status, n_open, n_event, n_buyer, n_currency, n_amount, n_fingerprint, n_agreed, n_course,
                        n_created, n_expires)
                 with ordinality u (slot, key, status, open, event, buyer, currency, amount, fingerprint, agreed, course,
                                    created, expires, n)
            where moved = '{}' or not u.n = any (moved)
            order by u.n
            on conflict (slot, key) do nothing
            returning p.key)
        select coalesce(array_agg(w.key), '{}') into added from written w;
        -- New rows that were all written, as nearly always, are known by their number.
        if cardinality(added) < cardinality(n_slot) then
            return query
            select 'new', u.n::integer,
                   case when u.n = any (moved) then 'moved' when p.key is null then 'missing' else 'exists' end,
                   p.slot, p.key, p.status, p.version, p.buyer, p.currency, p.amount, p.amount_captured, p.amount_refunded,
                   p.intent, p.fingerprint, coalesce(p.agreed, p.terms::text), coalesce(p.course, p.progress::text), p.event,
                   p.created_at, p.updated_at, p.expires_at, null
            from unnest(n_slot, n_key) with ordinality u (slot, key, n)
            left join oncepay.payments p on p.slot = u.slot and p.key = u.key and not u.n = any (moved)
            where not u.key = any (added);
        end if;
    end if;

    if cardinality(p_slot) > 0 then
        select coalesce(array_agg(u.n), '{}') into moved
        from unnest(p_slot) with ordinality u (slot, n)
        where not exists (
            select from oncepay.ranges r
            where r.first = any (p_ranges) and u.slot between r.first and r.last);

        -- Rows are locked in the order of (slot, key): two batches never wait for each other in a ring.
        if cardinality(p_slot) > 1 then
            perform from oncepay.payments p
            join unnest(p_slot, p_key) u (slot, key) on p.slot = u.slot and p.key = u.key
            order by p.slot, p.key
            for no key update of p;
        end if;

        with written as (
            update oncepay.payments p
            set status = u.status, version = u.expect + 1, intent = u.intent, course = u.course, progress = null,
                amount_captured = u.captured, amount_refunded = u.refunded, open_work = u.open, disputed = u.disputed,
                event = u.event, actor = p_actor, updated_at = epoch_zero + u.updated * ms
            from unnest(p_slot, p_key, p_expect, p_status, p_intent, p_course, p_captured, p_refunded, p_open, p_disputed, p_event,
                        p_updated)
                 with ordinality u (slot, key, expect, status, intent, course, captured, refunded, open, disputed, event, updated, n)
            where p.slot = u.slot and p.key = u.key and p.version = u.expect
              and not u.n = any (moved)
            returning u.n)
        select coalesce(array_agg(w.n), '{}') into done from written w;

        if cardinality(e_put) > 0 then
            insert into oncepay.entries (
                slot, key, entry_id, kind, currency, source, accounts, amounts, sellers, created_at, balance_transaction, fee)
            select p_slot[e.put], p_key[e.put], e.id, e.kind, e.currency, e.source, e.accounts::text[], e.amounts::bigint[],
                   e.sellers::text[], epoch_zero + p_updated[e.put] * ms, e.transaction, e.fee
            from unnest(e_put, e_id, e_kind, e_currency, e_source, e_accounts, e_amounts, e_sellers, e_transaction, e_fee)
                 e (put, id, kind, currency, source, accounts, amounts, sellers, transaction, fee)
            where e.put = any (done);
            -- A fee that stands by itself came later: then no row of the payment may say it already, which no key can tell.
            if 'stripe_fee' = any (select split_part(id, ':', 1) from unnest(e_id) id) and exists (
                select from unnest(e_put, e_id) u (put, id)
                join oncepay.entries e on e.slot = p_slot[u.put] and e.key = p_key[u.put] and e.fee is not null
                where u.id = 'stripe_fee:' || e.balance_transaction) then
                raise exception 'a fee is booked already' using errcode = 'unique_violation', constraint = 'entries_pkey';
            end if;
        end if;
        if cardinality(l_put) > 0 then
            insert into oncepay.balance_links (slot, key, entry_id, balance_transaction, created_at)
            select p_slot[l.put], p_key[l.put], coalesce(old.entry_id, l.entry), l.transaction, epoch_zero + p_updated[l.put] * ms
            from unnest(l_put, l_entry, l_transaction) l (put, entry, transaction)
            -- The payment's own entry had another id in earlier versions.
            left join lateral (
                select e.entry_id from oncepay.entries e
                where l.entry = 'payment' and e.slot = p_slot[l.put] and e.key = p_key[l.put] and e.kind = 'payment') old on true
            where l.put = any (done);
            if exists (
                select from unnest(l_put, l_entry, l_transaction) l (put, entry, transaction)
                join oncepay.entries e on e.slot = p_slot[l.put] and e.key = p_key[l.put] and e.entry_id = l.entry
                where e.balance_transaction = l.transaction) then
                raise exception 'a link is there already' using errcode = 'unique_violation', constraint = 'balance_links_pkey';
            end if;
        end if;

        if cardinality(done) < cardinality(p_slot) then
            return query
            select 'put', u.n::integer,
                   case when u.n = any (moved) then 'moved' when p.key is null then 'missing' else 'conflict' end,
                   p.slot, p.key, p.status, p.version, p.buyer, p.currency, p.amount, p.amount_captured, p.amount_refunded,
                   p.intent, p.fingerprint, coalesce(p.agreed, p.terms::text), coalesce(p.course, p.progress::text), p.event,
                   p.created_at, p.updated_at, p.expires_at, null
            from unnest(p_slot, p_key) with ordinality u (slot, key, n)
            left join oncepay.payments p on p.slot = u.slot and p.key = u.key and not u.n = any (moved)
            where not u.n = any (done);
        end if;
    end if;

    if cardinality(g_key) > 0 then
        return query
        select 'get', u.n::integer,
               case when exists (select from oncepay.ranges r where u.slot between r.first and r.last)
                    then case when p.key is null then 'missing' else 'found' end
                    else 'moved' end,
               p.slot, p.key, p.status, p.version, p.buyer, p.currency, p.amount, p.amount_captured, p.amount_refunded,
               p.intent, p.fingerprint, coalesce(p.agreed, p.terms::text), coalesce(p.course, p.progress::text), p.event,
               p.created_at, p.updated_at, p.expires_at,
               case when u.entries then (
                   select jsonb_agg(jsonb_build_object(
                       'entry_id', e.entry_id, 'kind', e.kind, 'currency', e.currency, 'source', e.source,
                       'accounts', e.accounts, 'amounts', e.amounts, 'sellers', e.sellers) order by e.created_at, e.entry_id)::text
                   from oncepay.ledger e where e.slot = p.slot and e.key = p.key) end
        from unnest(g_slot, g_key, g_entries) with ordinality u (slot, key, entries, n)
        left join oncepay.payments p on p.slot = u.slot and p.key = u.key;
    end if;
    if cardinality(g_intent) > 0 then
        return query
        select 'intent', u.n::integer, 'found',
               p.slot, p.key, p.status, p.version, p.buyer, p.currency, p.amount, p.amount_captured, p.amount_refunded,
               p.intent, p.fingerprint, coalesce(p.agreed, p.terms::text), coalesce(p.course, p.progress::text), p.event,
               p.created_at, p.updated_at, p.expires_at, null
        from unnest(g_intent) with ordinality u (intent, n)
        join oncepay.payments p on p.intent = u.intent
        where exists (select from oncepay.ranges r where p.slot between r.first and r.last);
    end if;

    -- A transaction that wrote nothing would not wait for a standby; this one always writes.
    perform pg_logical_emit_message(true, 'oncepay', p_nonce);
end $$;
revoke execute on function oncepay.commit_batch from public;
grant execute on function oncepay.commit_batch to oncepay_router, oncepay_worker;
