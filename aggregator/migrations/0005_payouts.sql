-- The latest version of each payout that any shard's feed has brought. Its first row comes in the batch that brings its entry,
-- so a payout that is here is one whose entry is in the sums: the next sequence is made from what this table holds.
create table oncepay.payouts (
    seller text not null,
    currency text not null,
    sequence bigint not null,
    key text not null unique,
    slot integer not null,
    status text not null,
    version bigint not null,
    amount bigint not null,
    payee text not null,
    ref_code text not null,
    run text not null,
    created_by text not null,
    positions text,
    progress text,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    shard text not null,
    lsn pg_lsn not null,
    primary key (seller, currency, sequence)
) with (fillfactor = 80);
create index payouts_created on oncepay.payouts (created_at, key);
create index payouts_open on oncepay.payouts (created_at, key)
    where status not in ('cleared', 'rejected', 'returned', 'deferred', 'canceled', 'refused', 'declined');

grant select on oncepay.payouts to oncepay_aggregator, oncepay_reader;
grant insert, update on oncepay.payouts to oncepay_aggregator;

-- Forget the payouts of `p_slots`: a rebuild brings them anew.
create function oncepay.forget_payouts(p_slots int4multirange) returns void
    language sql volatile security definer set search_path = pg_catalog as $$
    delete from oncepay.payouts where slot <@ p_slots;
$$;
revoke execute on function oncepay.forget_payouts from public;
grant execute on function oncepay.forget_payouts to oncepay_aggregator;
