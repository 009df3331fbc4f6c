-- The batch of 0002, for sessions that join only by looking up rows one by one (`enable_hashjoin` and its like are off there: a plan
-- that was made while the table was small read all of it in every batch until the next ANALYZE). New rows that were all written,
-- as nearly always, are known by their number.

create or replace function oncepay.commit_batch(
    p_ranges integer[],      -- first slots of the ranges touched, ascending
    p_epoch bigint,          -- the worker's epoch, or null for who needs none
    p_actor text,
    p_nonce text,
    -- puts, ascending by (slot, key), each key once; static members are null where an update is meant
    p_slot integer[], p_key text[], p_expect bigint[], p_status text[], p_intent text[], p_progress text[],
    p_captured bigint[], p_refunded bigint[], p_open boolean[], p_disputed boolean[], p_event text[],
    p_buyer text[], p_currency text[], p_amount bigint[], p_fingerprint bytea[], p_terms text[],
    p_created timestamptz[], p_expires timestamptz[], p_updated timestamptz[],
    -- entries of the puts: `put` is the put's ordinal; arrays as array literals
    e_put integer[], e_id text[], e_kind text[], e_currency text[], e_source text[],
    e_accounts text[], e_amounts text[], e_sellers text[],
    l_put integer[], l_entry text[], l_transaction text[],
    -- reads
    g_slot integer[], g_key text[], g_entries boolean[], g_intent text[]
) returns setof oncepay.answer
    language plpgsql volatile as $$
declare
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

    if cardinality(p_slot) > 0 then
        select coalesce(array_agg(u.n), '{}') into moved
        from unnest(p_slot) with ordinality u (slot, n)
        where not exists (
            select from oncepay.ranges r
            where r.first = any (p_ranges) and u.slot between r.first and r.last);

        if 0 = any (p_expect) then
            wanted := array(
                select u.n from unnest(p_expect) with ordinality u (expect, n)
                where u.expect = 0 and not u.n = any (moved) order by u.n);
            with written as (
                insert into oncepay.payments as p (
                    slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, intent,
                    fingerprint, terms, progress, open_work, disputed, event, actor, created_at, updated_at, expires_at)
                select u.slot, u.key, u.status, 1, u.buyer, u.currency, u.amount, u.captured, u.refunded, u.intent, u.fingerprint,
                       u.terms::jsonb, u.progress::jsonb, u.open, u.disputed, u.event, p_actor, u.created, u.updated, u.expires
                from unnest(p_slot, p_key, p_expect, p_status, p_intent, p_progress, p_captured, p_refunded, p_open, p_disputed,
                            p_event, p_buyer, p_currency, p_amount, p_fingerprint, p_terms, p_created, p_expires, p_updated)
                     with ordinality u (slot, key, expect, status, intent, progress, captured, refunded, open, disputed, event,
                                        buyer, currency, amount, fingerprint, terms, created, expires, updated, n)
                where u.expect = 0 and not u.n = any (moved)
                order by u.n
                on conflict (slot, key) do nothing
                returning p.key)
            select coalesce(array_agg(w.key), '{}') into added from written w;
            if cardinality(added) = cardinality(wanted) then
                done := wanted;
            else
                done := array(select n from unnest(wanted) n where p_key[n] = any (added));
            end if;
        end if;

        if 0 < any (p_expect) then
        -- Rows are locked in the order of (slot, key): two batches never wait for each other in a ring.
        if cardinality(p_slot) > 1 then
            perform from oncepay.payments p
            join unnest(p_slot, p_key, p_expect) u (slot, key, expect) on p.slot = u.slot and p.key = u.key
            where u.expect > 0
            order by p.slot, p.key
            for no key update of p;
        end if;

        with written as (
            update oncepay.payments p
            set status = u.status, version = u.expect + 1, intent = u.intent, progress = u.progress::jsonb,
                amount_captured = u.captured, amount_refunded = u.refunded, open_work = u.open, disputed = u.disputed, event = u.event, actor = p_actor,
                updated_at = u.updated
            from unnest(p_slot, p_key, p_expect, p_status, p_intent, p_progress, p_captured, p_refunded, p_open, p_disputed, p_event, p_updated)
                 with ordinality u (slot, key, expect, status, intent, progress, captured, refunded, open, disputed, event, updated, n)
            where p.slot = u.slot and p.key = u.key and u.expect > 0 and p.version = u.expect
              and not u.n = any (moved)
            returning u.n)
        select done || coalesce(array_agg(w.n), '{}') into done from written w;
        end if;

        if cardinality(e_put) > 0 then
            insert into oncepay.entries (slot, key, entry_id, kind, currency, source, accounts, amounts, sellers, created_at)
            select p_slot[e.put], p_key[e.put], e.id, e.kind, e.currency, e.source,
                   e.accounts::text[], e.amounts::bigint[], e.sellers::text[], p_updated[e.put]
            from unnest(e_put, e_id, e_kind, e_currency, e_source, e_accounts, e_amounts, e_sellers)
                 e (put, id, kind, currency, source, accounts, amounts, sellers)
            where e.put = any (done);
        end if;
        if cardinality(l_put) > 0 then
            insert into oncepay.balance_links (slot, key, entry_id, balance_transaction, created_at)
            select p_slot[l.put], p_key[l.put], l.entry, l.transaction, p_updated[l.put]
            from unnest(l_put, l_entry, l_transaction) l (put, entry, transaction)
            where l.put = any (done);
        end if;

        if cardinality(done) < cardinality(p_slot) then
        return query
        select 'put', u.n::integer,
               case when u.n = any (moved) then 'moved'
                    when p.key is null then 'missing'
                    when u.expect = 0 then 'exists'
                    else 'conflict' end,
               p.slot, p.key, p.status, p.version, p.buyer, p.currency, p.amount, p.amount_captured, p.amount_refunded,
               p.intent, p.fingerprint, p.terms::text, p.progress::text, p.event, p.created_at, p.updated_at, p.expires_at,
               null
        from unnest(p_slot, p_key, p_expect) with ordinality u (slot, key, expect, n)
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
               p.intent, p.fingerprint, p.terms::text, p.progress::text, p.event, p.created_at, p.updated_at, p.expires_at,
               case when u.entries then (
                   select jsonb_agg(jsonb_build_object(
                       'entry_id', e.entry_id, 'kind', e.kind, 'currency', e.currency, 'source', e.source,
                       'accounts', e.accounts, 'amounts', e.amounts, 'sellers', e.sellers) order by e.created_at, e.entry_id)::text
                   from oncepay.entries e where e.slot = p.slot and e.key = p.key) end
        from unnest(g_slot, g_key, g_entries) with ordinality u (slot, key, entries, n)
        left join oncepay.payments p on p.slot = u.slot and p.key = u.key;
    end if;
    if cardinality(g_intent) > 0 then
        return query
        select 'intent', u.n::integer, 'found',
               p.slot, p.key, p.status, p.version, p.buyer, p.currency, p.amount, p.amount_captured, p.amount_refunded,
               p.intent, p.fingerprint, p.terms::text, p.progress::text, p.event, p.created_at, p.updated_at, p.expires_at,
               null
        from unnest(g_intent) with ordinality u (intent, n)
        join oncepay.payments p on p.intent = u.intent
        where exists (select from oncepay.ranges r where p.slot between r.first and r.last);
    end if;

    -- A transaction that wrote nothing would not wait for a standby; this one always writes.
    perform pg_logical_emit_message(true, 'oncepay', p_nonce);
end $$;
