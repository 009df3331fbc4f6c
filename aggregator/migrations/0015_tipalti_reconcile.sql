-- Reconciliation with Tipalti: a copy of its payments and of what came to the balance from the bank.
create table oncepay.tipalti_payments (
    id text primary key,
    ref_code text not null,
    status text not null,
    -- Tipalti's final states: such a payment never changes again.
    final boolean not null generated always as (
        lower(status) in ('canceled', 'cancelled', 'cleared', 'deferred', 'deferred (internal)', 'rejected')) stored,
    -- In these the payer has its money back, but for the fee.
    given_back boolean not null generated always as (
        lower(status) in ('canceled', 'cancelled', 'deferred', 'deferred (internal)', 'rejected')) stored,
    currency text not null,
    amount bigint not null,
    fee bigint not null,
    fee_currency text not null,
    reason text not null,
    created_at timestamptz not null,
    changed_at timestamptz not null
);
create index tipalti_payments_ref_code on oncepay.tipalti_payments (ref_code);
create index tipalti_payments_created on oncepay.tipalti_payments (created_at);
create index tipalti_payments_changed on oncepay.tipalti_payments (changed_at);
create index tipalti_payments_open on oncepay.tipalti_payments (ref_code) where not final;

create table oncepay.tipalti_fundings (
    id text primary key,
    currency text not null,
    amount bigint not null,
    created_at timestamptz not null
);
create index tipalti_fundings_created on oncepay.tipalti_fundings (created_at);

-- Where each of Tipalti's lists is read on: the end of its last full page.
create table oncepay.tipalti_reading (
    list text primary key,
    cursor text not null
);

create index payouts_ref_code on oncepay.payouts (ref_code);
-- Such an index doesn't end updates within the page (HOT).
create index payouts_updated on oncepay.payouts using brin (updated_at timestamptz_minmax_multi_ops);

grant select on oncepay.tipalti_payments, oncepay.tipalti_fundings, oncepay.tipalti_reading to oncepay_aggregator, oncepay_reader;
grant insert, update on oncepay.tipalti_payments, oncepay.tipalti_fundings, oncepay.tipalti_reading to oncepay_aggregator;
