-- Each version of each payment: which event made it, by which process, at which position of its shard's log. `lsn` is null
-- where the version is known from a rebuild: it was committed at or before the position that the rebuild began at.
create table oncepay.payment_history (
    key text not null,
    version bigint not null,
    slot integer not null,
    status text not null,
    event text not null,
    actor text not null,
    committed_at timestamptz not null,
    shard text not null,
    lsn pg_lsn,
    primary key (key, version)
);
grant select on oncepay.payment_history to oncepay_aggregator, oncepay_reader;
grant insert on oncepay.payment_history to oncepay_aggregator;
