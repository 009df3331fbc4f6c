-- What the aggregator derives from the shards' feeds. Everything here can be made again from the shards; nothing here
-- is a source of truth.

create schema oncepay;

-- How far each shard's feed has been applied. Moved in the transaction that applies the batch, so that what the other
-- tables hold is exactly what the shards committed up to these positions.
create table oncepay.watermarks (
    shard text primary key,
    incarnation text not null,
    epoch bigint not null,
    lsn pg_lsn not null,
    applied_at timestamptz not null default clock_timestamp()
);

-- The latest version of each payment that any shard's feed has brought. `items` and `platform_fee` are null only while
-- a moved payment's later change has come and the shard that it came from hasn't sent its terms yet.
create table oncepay.payments (
    key text primary key,
    slot integer not null,
    status text not null,
    version bigint not null,
    buyer text not null,
    currency text not null,
    amount bigint not null,
    amount_captured bigint not null,
    amount_refunded bigint not null,
    payment_intent text,
    items text,
    platform_fee bigint,
    failure text,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    shard text not null,
    lsn pg_lsn not null
) with (fillfactor = 80);
create index payments_of_buyer on oncepay.payments (buyer, created_at desc, key desc);

-- Every ledger entry once, whichever shard's feed brought it first, as the shard holds it.
create table oncepay.entries (
    key text not null,
    entry_id text not null,
    slot integer not null,
    kind text not null,
    currency text not null,
    source text not null,
    accounts text[] not null,
    amounts bigint[] not null,
    sellers text[] not null,
    created_at timestamptz not null,
    shard text not null,
    lsn pg_lsn not null,
    primary key (key, entry_id)
);

create table oncepay.balance_links (
    balance_transaction text not null,
    key text not null,
    entry_id text not null,
    slot integer not null,
    created_at timestamptz not null,
    shard text not null,
    lsn pg_lsn not null,
    primary key (balance_transaction, key, entry_id)
);

-- Sums over `entries`, kept up to date in the transaction that inserts them. Each shard has rows of its own, so that
-- two shards' batches never wait for each other; readers add them up. An entry counts in the shard that brought it.
create table oncepay.seller_days (
    seller text not null,
    currency text not null,
    day date not null,
    shard text not null,
    payments bigint not null,
    gross bigint not null,
    refunded bigint not null,
    disputed bigint not null,
    fees bigint not null,
    net bigint not null,
    primary key (seller, currency, day, shard),
    constraint seller_days_net check (net = gross - refunded - disputed - fees)
) with (fillfactor = 70);

create table oncepay.account_totals (
    account text not null,
    currency text not null,
    shard text not null,
    debit numeric not null check (debit >= 0),
    credit numeric not null check (credit >= 0),
    primary key (account, currency, shard)
) with (fillfactor = 70);

-- How many entries of a kind there are, and what they debited in all.
create table oncepay.kind_totals (
    kind text not null,
    currency text not null,
    shard text not null,
    entries bigint not null,
    amount numeric not null,
    primary key (kind, currency, shard)
) with (fillfactor = 70);
