-- Events out: what happened, in the order of each shard's feed, and how far each endpoint has got with it.

create table oncepay.events (
    shard text not null,
    lsn pg_lsn not null,
    ordinal integer not null,
    id text not null unique,
    type text not null,
    key text not null,
    at timestamptz not null,
    data text not null,
    recorded_at timestamptz not null default clock_timestamp(),
    primary key (shard, lsn, ordinal)
);
create index events_recorded on oncepay.events using brin (recorded_at timestamptz_minmax_multi_ops);

-- An endpoint is past an event when it was delivered, or stands in event_retries. Moved in one transaction with these.
create table oncepay.event_cursors (
    endpoint text not null,
    shard text not null,
    lsn pg_lsn not null,
    ordinal integer not null,
    primary key (endpoint, shard)
);

-- Events that weren't delivered yet, and those behind them of the same key; dead: given up.
create table oncepay.event_retries (
    endpoint text not null,
    id text not null,
    shard text not null,
    lsn pg_lsn not null,
    ordinal integer not null,
    key text not null,
    attempts integer not null,
    next_at timestamptz not null,
    dead boolean not null default false,
    problem text not null default '',
    primary key (endpoint, id)
);
create index event_retries_open on oncepay.event_retries (endpoint, key, lsn, ordinal) where not dead;

create table oncepay.event_deliveries (
    endpoint text not null,
    n bigint generated always as identity,
    event text not null,
    type text not null,
    key text not null,
    attempt integer not null,
    at timestamptz not null default clock_timestamp(),
    status integer,
    problem text not null,
    duration_ms integer not null,
    primary key (endpoint, n)
);
create index event_deliveries_at on oncepay.event_deliveries using brin (at timestamptz_minmax_multi_ops);

grant select on oncepay.events, oncepay.event_cursors, oncepay.event_retries, oncepay.event_deliveries
    to oncepay_aggregator, oncepay_reader;
grant insert, delete on oncepay.events, oncepay.event_deliveries to oncepay_aggregator;
grant insert, update, delete on oncepay.event_cursors, oncepay.event_retries to oncepay_aggregator;
