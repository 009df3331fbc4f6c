-- A table of $1 prepared keys.
drop table if exists prepared_keys;
create table prepared_keys (id bigint generated always as identity primary key, key text not null);
insert into prepared_keys (key) select gen_random_uuid()::text from generate_series(1, $1);
vacuum analyze prepared_keys;
checkpoint
