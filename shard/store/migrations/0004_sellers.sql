-- Sellers: their payee at Tipalti, the currency they are paid in, and their own fee where they have one. A seller's row is
-- in the shard that its key `seller:<id>` hashes to, and moves with its slot.

create table oncepay.sellers (
    slot integer not null,
    key text not null check (key like 'seller:%'),
    payee text not null check (char_length(payee) between 1 and 64),
    currency text not null check (currency ~ '^[a-z]{3}$'),
    -- Both null: the deployment's default fee.
    basis_points integer check (basis_points between 0 and 10000),
    fixed_minor bigint check (fixed_minor >= 0),
    version bigint not null check (version > 0),
    actor text not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    primary key (slot, key),
    constraint sellers_slot_of_key check (slot = oncepay.slot_of(key)),
    constraint sellers_fee_whole check ((basis_points is null) = (fixed_minor is null))
);

grant select on oncepay.sellers to oncepay_router, oncepay_worker, oncepay_aggregator, oncepay_operator, oncepay_reader;
grant insert, update on oncepay.sellers to oncepay_router;

-- Write a seller as a whole. The same values again change nothing, not even the version. outcome: 'created', 'replaced',
-- 'same' (the row as it is follows), 'moved' (the slot is not this shard's). Lock classes: see 0002.
create function oncepay.put_seller(
    p_first integer,         -- the first slot of the range that is meant to hold p_slot
    p_actor text, p_nonce text,
    p_slot integer, p_key text, p_payee text, p_currency text, p_basis_points integer, p_fixed_minor bigint, p_now timestamptz
) returns table (
    outcome text, key text, payee text, currency text, basis_points integer, fixed_minor bigint, version bigint,
    created_at timestamptz, updated_at timestamptz
) language plpgsql volatile as $$
#variable_conflict use_column
declare
    done text := 'same';
    written bigint;
begin
    perform pg_advisory_xact_lock_shared(1, p_first);
    if not exists (select from oncepay.ranges r where r.first = p_first and p_slot between r.first and r.last) then
        return query select 'moved', p_key, null::text, null::text, null::integer, null::bigint, null::bigint,
                            null::timestamptz, null::timestamptz;
        return;
    end if;
    insert into oncepay.sellers as s (slot, key, payee, currency, basis_points, fixed_minor, version, actor, created_at, updated_at)
    values (p_slot, p_key, p_payee, p_currency, p_basis_points, p_fixed_minor, 1, p_actor, p_now, p_now)
    on conflict (slot, key) do update
        set payee = excluded.payee, currency = excluded.currency, basis_points = excluded.basis_points,
            fixed_minor = excluded.fixed_minor, version = s.version + 1, actor = excluded.actor,
            updated_at = greatest(excluded.updated_at, s.updated_at)
        where (s.payee, s.currency, s.basis_points, s.fixed_minor)
              is distinct from (excluded.payee, excluded.currency, excluded.basis_points, excluded.fixed_minor)
    returning s.version into written;
    if found then
        done := case when written = 1 then 'created' else 'replaced' end;
    end if;
    return query select done, s.key, s.payee, s.currency, s.basis_points, s.fixed_minor, s.version, s.created_at, s.updated_at
                 from oncepay.sellers s where s.slot = p_slot and s.key = p_key;
    -- A transaction that wrote nothing would not wait for a standby; this one always writes.
    perform pg_logical_emit_message(true, 'oncepay', p_nonce);
end $$;
revoke execute on function oncepay.put_seller from public;
grant execute on function oncepay.put_seller to oncepay_router;
