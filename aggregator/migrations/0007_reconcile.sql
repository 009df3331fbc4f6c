-- Reconciliation: a copy of Stripe's balance transactions, the runs, and what they found.
create table oncepay.stripe_transactions (
    id text primary key,
    type text not null,
    category text not null,
    currency text not null,
    amount bigint not null,
    fee bigint not null,
    net bigint not null,
    source text,
    created_at timestamptz not null
);
create index stripe_transactions_created on oncepay.stripe_transactions (created_at);

create table oncepay.reconciliations (
    id text primary key,
    first timestamptz not null,
    last timestamptz not null check (last > first),
    asked_by text not null,
    state text not null check (state in ('running', 'done', 'failed')),
    started_at timestamptz not null default clock_timestamp(),
    ended_at timestamptz,
    checked jsonb not null default '{}',
    differences bigint,
    problem text
);
create index reconciliations_started on oncepay.reconciliations (started_at);

create table oncepay.reconciliation_differences (
    run text not null references oncepay.reconciliations (id),
    n bigint generated always as identity,
    kind text not null,
    transaction text,
    key text,
    entry_id text,
    source text,
    category text,
    currency text,
    expected bigint,
    actual bigint,
    detail text not null default '',
    primary key (run, n)
);

grant select on oncepay.stripe_transactions, oncepay.reconciliations, oncepay.reconciliation_differences
    to oncepay_aggregator, oncepay_reader;
grant insert, update on oncepay.stripe_transactions, oncepay.reconciliations to oncepay_aggregator;
grant insert, update on oncepay.reconciliation_differences to oncepay_aggregator;
