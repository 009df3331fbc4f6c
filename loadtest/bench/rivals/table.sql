-- The rivals' tables, one each, on the same Postgres as the shard's own. `{name}` is the rival's.
create schema if not exists rivals;
drop table if exists rivals.{name};
create table rivals.{name} (
    key text primary key,
    buyer text not null,
    currency text not null,
    amount bigint not null check (amount > 0),
    items jsonb not null,
    payment_method text not null,
    status text not null,
    created_at timestamptz not null
);
