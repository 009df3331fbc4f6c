-- What belongs to no payment: entries under a reserved key that is made of the provider's id, `stripe:<balance transaction>`.
-- The same again changes nothing. outcome: 'booked', 'same', 'differs' (it was booked otherwise), 'moved' (not this shard's slot).
-- The aggregator's role can write such entries by this function alone. Lock classes: see 0002.
create function oncepay.book_transaction(
    p_first integer,         -- the first slot of the range that is meant to hold p_slot
    p_nonce text,
    p_slot integer, p_key text, p_transaction text, p_now timestamptz,
    e_id text[], e_kind text[], e_currency text[], e_accounts text[], e_amounts text[]   -- arrays as array literals
) returns table (outcome text)
    language plpgsql volatile security definer set search_path = pg_catalog, oncepay as $$
declare
    added integer;
begin
    if p_key <> 'stripe:' || p_transaction then
        raise exception '% is not the key of %', p_key, p_transaction using errcode = 'check_violation';
    end if;
    perform pg_advisory_xact_lock_shared(1, p_first);
    if not exists (select from oncepay.ranges r where r.first = p_first and p_slot between r.first and r.last) then
        return query select 'moved';
        return;
    end if;
    insert into oncepay.entries (slot, key, entry_id, kind, currency, source, accounts, amounts, sellers, created_at)
    select p_slot, p_key, e.id, e.kind, e.currency, p_transaction, e.accounts::text[], e.amounts::bigint[],
           array_fill(''::text, array[cardinality(e.accounts::text[])]), p_now
    from unnest(e_id, e_kind, e_currency, e_accounts, e_amounts) e (id, kind, currency, accounts, amounts)
    on conflict do nothing;
    get diagnostics added = row_count;
    if added > 0 then
        insert into oncepay.balance_links (slot, key, entry_id, balance_transaction, created_at)
        select p_slot, p_key, e.id, p_transaction, p_now
        from unnest(e_id, e_accounts) e (id, accounts)
        where 'stripe:clearing' = any (e.accounts::text[])
        on conflict do nothing;
        return query select 'booked';
    elsif exists (
        select from unnest(e_id, e_kind, e_currency, e_accounts, e_amounts) e (id, kind, currency, accounts, amounts)
        join oncepay.entries b on b.slot = p_slot and b.key = p_key and b.entry_id = e.id
        where (b.kind, b.currency, b.accounts, b.amounts)
            is distinct from (e.kind, e.currency, e.accounts::text[], e.amounts::bigint[])) then
        return query select 'differs';
    else
        return query select 'same';
    end if;
    -- A transaction that wrote nothing would not wait for a standby; this one always writes.
    perform pg_logical_emit_message(true, 'oncepay', p_nonce);
end $$;
revoke execute on function oncepay.book_transaction from public;
grant execute on function oncepay.book_transaction to oncepay_aggregator;
grant execute on function oncepay.evidence(text[], text) to oncepay_aggregator;
