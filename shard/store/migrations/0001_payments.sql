-- A shard's source of truth: payments, their ledger entries, and the ranges of slots that this shard owns.
-- Constraints carry the promises; the functions of 0002 are the only way in which services write.

create schema oncepay;

-- The slot of a key: the first 16 bits of its SHA-256. Kept in every row, checked here.
create function oncepay.slot_of(key text) returns integer
    language sql immutable strict parallel safe
    return get_byte(sha256(convert_to(key, 'UTF8')), 0) * 256 + get_byte(sha256(convert_to(key, 'UTF8')), 1);

create function oncepay.sums_to_zero(amounts bigint[]) returns boolean
    language plpgsql immutable strict parallel safe as $$
declare
    total numeric := 0;
    amount bigint;
begin
    foreach amount in array amounts loop
        total := total + amount;
    end loop;
    return total = 0;
end $$;

-- Who this shard is. `incarnation` changes when the shard is restored from a backup: positions of one incarnation
-- mean nothing in another.
create table oncepay.identity (
    only_row boolean primary key default true check (only_row),
    shard text not null,
    incarnation text not null
);

-- The ranges of slots that this shard owns, with the version of the map that gave them. A write locks `first` (shared,
-- advisory, until it commits) and then looks here in a statement of its own; the fence locks it exclusively.
create table oncepay.ranges (
    first integer primary key check (first between 0 and 65535),
    last integer not null check (last between first and 65535),
    map_version bigint not null
);

-- The epoch of the shard's active worker: raised at every takeover, compared in each of its transactions.
create table oncepay.worker_epoch (
    only_row boolean primary key default true check (only_row),
    epoch bigint not null default 0,
    holder text not null default ''
);
insert into oncepay.worker_epoch default values;

create table oncepay.payments (
    slot integer not null,
    key text not null,
    status text not null,
    version bigint not null check (version > 0),
    buyer text not null,
    currency text not null check (currency ~ '^[a-z]{3}$'),
    amount bigint not null check (amount > 0),
    amount_captured bigint not null default 0 check (amount_captured between 0 and amount),
    amount_refunded bigint not null default 0 check (amount_refunded between 0 and amount_captured),
    intent text,
    fingerprint bytea not null,
    terms jsonb not null,
    progress jsonb not null,
    open_work boolean not null,
    disputed boolean not null default false,
    event text not null,
    actor text not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    expires_at timestamptz not null,
    primary key (slot, key),
    constraint payments_slot_of_key check (slot = oncepay.slot_of(key)),
    constraint payments_status check (status in (
        'created', 'attempted', 'confirming', 'processing', 'requires_payment_method', 'requires_action',
        'requires_capture', 'canceling', 'succeeded', 'failed', 'canceled')),
    constraint payments_open_until_terminal check (open_work or status in ('succeeded', 'failed', 'canceled')),
    constraint payments_confirmed_has_intent check (
        intent is not null or status in ('created', 'failed', 'canceled'))
) with (fillfactor = 80);

create unique index payments_intent on oncepay.payments (intent) where intent is not null;

-- The payments on which a worker may still have something to do; what is settled costs nothing here.
create index payments_open on oncepay.payments (slot, key) where open_work;

create index payments_disputed on oncepay.payments (created_at, key collate "C") where disputed;

-- Pages of the list calls, newest first.
create index payments_created on oncepay.payments (created_at, key collate "C");
create index payments_buyer on oncepay.payments (buyer, created_at, key collate "C");

create function oncepay.refuse_terminal_change() returns trigger language plpgsql as $$
begin
    raise exception 'payment % is %: it can''t become %', old.key, old.status, new.status
        using errcode = 'integrity_constraint_violation', constraint = 'payments_terminal_is_terminal';
end $$;
create trigger payments_terminal_is_terminal before update on oncepay.payments for each row
    when (old.status in ('succeeded', 'failed', 'canceled') and new.status is distinct from old.status)
    execute function oncepay.refuse_terminal_change();
create trigger payments_identity_is_fixed before update on oncepay.payments for each row
    when (old.key <> new.key or old.slot <> new.slot or old.amount <> new.amount or old.currency <> new.currency
          or old.fingerprint <> new.fingerprint or new.version <= old.version
          or (old.intent is not null and new.intent is distinct from old.intent))
    execute function oncepay.refuse_terminal_change();

-- Entries: postings as parallel arrays (account, amount, on whose behalf). Debits are positive. Balance is the row's own
-- property, so there is no hot account to lock.
create table oncepay.entries (
    slot integer not null,
    key text not null,
    entry_id text not null,
    kind text not null,
    currency text not null check (currency ~ '^[a-z]{3}$'),
    source text not null,
    accounts text[] not null,
    amounts bigint[] not null,
    sellers text[] not null,
    created_at timestamptz not null,
    primary key (slot, key, entry_id),
    constraint entries_slot_of_key check (slot = oncepay.slot_of(key)),
    constraint entries_balance check (
        oncepay.sums_to_zero(amounts) and cardinality(amounts) >= 2
        and cardinality(accounts) = cardinality(amounts) and cardinality(sellers) = cardinality(amounts))
);

-- Which balance transaction at Stripe an entry's posting on the clearing account belongs to.
create table oncepay.balance_links (
    slot integer not null,
    key text not null,
    entry_id text not null,
    balance_transaction text not null,
    created_at timestamptz not null,
    primary key (slot, key, entry_id, balance_transaction),
    constraint balance_links_slot_of_key check (slot = oncepay.slot_of(key)),
    foreign key (slot, key, entry_id) references oncepay.entries (slot, key, entry_id)
);
create index balance_links_transaction on oncepay.balance_links (balance_transaction);

create function oncepay.refuse_change() returns trigger language plpgsql as $$
begin
    raise exception '% is append-only: % refused', tg_table_name, tg_op
        using errcode = 'integrity_constraint_violation', constraint = 'append_only';
end $$;
create trigger entries_append_only before update or delete or truncate on oncepay.entries
    for each statement execute function oncepay.refuse_change();
create trigger balance_links_append_only before update or delete or truncate on oncepay.balance_links
    for each statement execute function oncepay.refuse_change();

create publication oncepay_feed for table oncepay.payments, oncepay.entries, oncepay.balance_links
    with (publish = 'insert, update');
