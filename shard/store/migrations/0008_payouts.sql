-- Payouts: a row of its own table for each, in the shard that its key `payout:<seller>:<currency>:<sequence>` hashes to, with
-- the ledger entries of its key in the one table of entries. A row is committed before Tipalti hears of it, and a sequence
-- is made once: that is what keeps a seller from being paid twice.

create table oncepay.payouts (
    slot integer not null,
    key text not null,
    seller text not null,
    currency text not null check (currency ~ '^[a-z]{3}$'),
    sequence bigint not null check (sequence > 0),
    status text not null,
    version bigint not null check (version > 0),
    amount bigint not null check (amount > 0),
    payee text not null check (char_length(payee) between 1 and 64),
    ref_code text not null check (char_length(ref_code) between 1 and 64),
    run text not null,
    created_by text not null,
    positions jsonb not null,
    progress jsonb not null,
    open_work boolean not null,
    event text not null,
    actor text not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    primary key (slot, key),
    constraint payouts_slot_of_key check (slot = oncepay.slot_of(key)),
    constraint payouts_key check (key = 'payout:' || seller || ':' || currency || ':' || sequence),
    constraint payouts_status check (status in (
        'awaiting_approval', 'created', 'submitting', 'submitted', 'scheduled', 'pending_funds', 'risk_review', 'paid',
        'cleared', 'rejected', 'returned', 'deferred', 'canceled', 'refused', 'declined')),
    constraint payouts_open_until_over check (open_work = (status not in (
        'cleared', 'rejected', 'returned', 'deferred', 'canceled', 'refused', 'declined')))
) with (fillfactor = 80);

-- A notification brings only the reference code.
create unique index payouts_ref_code on oncepay.payouts (ref_code);
create index payouts_open on oncepay.payouts (slot, key) where open_work;

create function oncepay.refuse_payout_change() returns trigger language plpgsql as $$
begin
    raise exception 'payout % is %: it can''t become %', old.key, old.status, new.status
        using errcode = 'integrity_constraint_violation', constraint = 'payouts_over_is_over';
end $$;
create trigger payouts_over_is_over before update on oncepay.payouts for each row
    when (not old.open_work and new.status <> old.status)
    execute function oncepay.refuse_payout_change();
create trigger payouts_identity_is_fixed before update on oncepay.payouts for each row
    when (old.key <> new.key or old.slot <> new.slot or old.amount <> new.amount or old.payee <> new.payee
          or old.ref_code <> new.ref_code or new.version <= old.version)
    execute function oncepay.refuse_payout_change();

alter publication oncepay_feed add table oncepay.payouts;

grant select on oncepay.payouts to oncepay_router, oncepay_worker, oncepay_aggregator, oncepay_operator, oncepay_reader;

-- Write payouts with their entries: one transaction, and one answer for each. `p_puts` is an array of
-- {slot, key, expect, row: {…}, entries: […]}, ascending by (slot, key), each key once; `expect` is 0 for a new row, else the
-- version that the row must still have. `p_not_after`: new rows are refused when this shard's clock is past it, since what they
-- were computed from is too old then. Outcomes: 'done'; 'exists', 'conflict' (the row as it is follows), 'missing', 'moved',
-- 'late'. Lock classes: see 0002.
create function oncepay.put_payouts(
    p_ranges integer[],      -- first slots of the ranges touched, ascending
    p_epoch bigint,          -- the worker's epoch, or null for who needs none
    p_actor text, p_nonce text,
    p_puts jsonb,
    p_not_after timestamptz
) returns jsonb
    language plpgsql volatile security definer set search_path = pg_catalog as $$
declare
    first_slot integer;
    put jsonb;
    item jsonb;
    known oncepay.payouts;
    outcome text;
    answers jsonb := '[]';
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
    for put in select * from jsonb_array_elements(p_puts) loop
        known := null;
        if not exists (
            select from oncepay.ranges r
            where r.first = any (p_ranges) and (put ->> 'slot')::integer between r.first and r.last)
        then
            outcome := 'moved';
        else
            select * into known from oncepay.payouts p
            where p.slot = (put ->> 'slot')::integer and p.key = put ->> 'key' for update;
            outcome := case
                when (put ->> 'expect')::bigint = 0 then
                    case when known.key is not null then 'exists' when clock_timestamp() > p_not_after then 'late' else 'done' end
                when known.key is null then 'missing'
                when known.version <> (put ->> 'expect')::bigint then 'conflict'
                else 'done' end;
        end if;
        if outcome = 'done' then
            item := put -> 'row';
            if known.key is null then
                insert into oncepay.payouts (
                    slot, key, seller, currency, sequence, status, version, amount, payee, ref_code, run, created_by, positions,
                    progress, open_work, event, actor, created_at, updated_at)
                values (
                    (put ->> 'slot')::integer, put ->> 'key', item ->> 'seller', item ->> 'currency', (item ->> 'sequence')::bigint,
                    item ->> 'status', 1, (item ->> 'amount')::bigint, item ->> 'payee', item ->> 'ref_code', item ->> 'run',
                    item ->> 'created_by', item -> 'positions', item -> 'progress', (item ->> 'open_work')::boolean,
                    item ->> 'event', p_actor, (item ->> 'created_at')::timestamptz, (item ->> 'updated_at')::timestamptz)
                on conflict (slot, key) do nothing;
                if not found then -- another run made it since the look above
                    outcome := 'exists';
                    select * into known from oncepay.payouts p
                    where p.slot = (put ->> 'slot')::integer and p.key = put ->> 'key';
                end if;
            else
                update oncepay.payouts p
                set status = item ->> 'status', version = known.version + 1, progress = item -> 'progress',
                    open_work = (item ->> 'open_work')::boolean, event = item ->> 'event', actor = p_actor,
                    updated_at = (item ->> 'updated_at')::timestamptz
                where p.slot = known.slot and p.key = known.key;
            end if;
        end if;
        if outcome = 'done' then
            insert into oncepay.entries (slot, key, entry_id, kind, currency, source, accounts, amounts, sellers, created_at)
            select (put ->> 'slot')::integer, put ->> 'key', e ->> 'entry_id', e ->> 'kind', e ->> 'currency', e ->> 'source',
                   array(select jsonb_array_elements_text(e -> 'accounts')),
                   array(select jsonb_array_elements_text(e -> 'amounts'))::bigint[],
                   array(select jsonb_array_elements_text(e -> 'sellers')), (item ->> 'updated_at')::timestamptz
            from jsonb_array_elements(put -> 'entries') e;
        end if;
        answers := answers || jsonb_build_object(
            'outcome', outcome,
            'row', case when outcome in ('exists', 'conflict') then oncepay.payout_json(known) end);
    end loop;
    -- A transaction that wrote nothing would not wait for a standby; this one always writes.
    perform pg_logical_emit_message(true, 'oncepay', p_nonce);
    return answers;
end $$;

-- A payout as JSON, times in milliseconds since 1970.
create function oncepay.payout_json(p oncepay.payouts) returns jsonb
    language sql stable as $$
    select jsonb_build_object(
        'key', p.key, 'seller', p.seller, 'currency', p.currency, 'sequence', p.sequence, 'status', p.status,
        'version', p.version, 'amount', p.amount, 'payee', p.payee, 'ref_code', p.ref_code, 'run', p.run,
        'created_by', p.created_by, 'positions', p.positions, 'progress', p.progress,
        'created_at_ms', round(extract(epoch from p.created_at) * 1000)::bigint,
        'updated_at_ms', round(extract(epoch from p.updated_at) * 1000)::bigint, 'event', p.event, 'actor', p.actor)
$$;

revoke execute on function oncepay.put_payouts, oncepay.payout_json, oncepay.refuse_payout_change from public;
grant execute on function oncepay.put_payouts, oncepay.payout_json to oncepay_router, oncepay_worker, oncepay_aggregator;
grant execute on function oncepay.evidence to oncepay_aggregator;

-- Money that went from the bank to the platform's balance at Tipalti (negative: came back), under the key `tipalti:<funding>`. Once,
-- by its id. Outcomes: 'booked', 'same', 'differs' (it was booked otherwise), 'moved' (not this shard's slot).
create function oncepay.book_funding(
    p_first integer,         -- the first slot of the range that is meant to hold p_slot
    p_nonce text,
    p_slot integer, p_key text, p_funding text, p_currency text, p_amount bigint, p_now timestamptz
) returns text
    language plpgsql volatile security definer set search_path = pg_catalog as $$
declare
    outcome text := 'moved';
begin
    if p_key <> 'tipalti:' || p_funding then
        raise exception '% is not the key of %', p_key, p_funding using errcode = 'check_violation';
    end if;
    perform pg_advisory_xact_lock_shared(1, p_first);
    if exists (select from oncepay.ranges r where r.first = p_first and p_slot between r.first and r.last) then
        insert into oncepay.entries (slot, key, entry_id, kind, currency, source, accounts, amounts, sellers, created_at)
        values (p_slot, p_key, 'funding', 'funding', p_currency, p_funding, array['tipalti:clearing', 'bank'],
                array[p_amount, -p_amount], array['', ''], p_now)
        on conflict (slot, key, entry_id) do nothing;
        if found then
            outcome := 'booked';
        else
            outcome := case when exists (
                select from oncepay.entries e
                where e.slot = p_slot and e.key = p_key and e.currency = p_currency and e.amounts = array[p_amount, -p_amount])
                then 'same' else 'differs' end;
        end if;
    end if;
    -- A transaction that wrote nothing would not wait for a standby; this one always writes.
    perform pg_logical_emit_message(true, 'oncepay', p_nonce);
    return outcome;
end $$;
revoke execute on function oncepay.book_funding from public;
grant execute on function oncepay.book_funding to oncepay_aggregator;
