-- Events out: recording, reading in order, retries, dead letters, replay.

-- name: payments_before
-- The states that a batch finds, of its own keys.
select key, status, version from oncepay.payments where key = any ($1::text[])

-- name: payouts_before
select key, status, version from oncepay.payouts where key = any ($1::text[])

-- name: record
-- In the transaction that applies the batch. What another shard has brought already is no event again.
insert into oncepay.events (shard, lsn, ordinal, id, type, key, at, data)
select $1, u.lsn, u.ordinal, u.id, u.type, u.key, u.at, u.data
from unnest($2::pg_lsn[], $3::integer[], $4::text[], $5::text[], $6::text[], $7::timestamptz[], $8::text[])
     u (lsn, ordinal, id, type, key, at, data)
on conflict do nothing

-- name: begin_cursors
-- An endpoint begins at what is applied now.
insert into oncepay.event_cursors (endpoint, shard, lsn, ordinal)
select $1, shard, lsn, 2147483647 from oncepay.watermarks
on conflict do nothing

-- name: shards
-- Where the endpoint is in each shard's events; a shard that came later begins with its first.
select w.shard, coalesce(c.lsn, '0/0'::pg_lsn) as lsn, coalesce(c.ordinal, -1) as ordinal
from oncepay.watermarks w
left join oncepay.event_cursors c on c.endpoint = $1 and c.shard = w.shard
order by w.shard

-- name: fresh
-- The next events of a shard, with what a payment's event needs beside what it was recorded with.
select e.shard, e.lsn, e.ordinal, e.id, e.type, e.key, e.at, e.data, 0 as attempts
from oncepay.events e
where e.shard = $1 and (e.lsn, e.ordinal) > ($2, $3)
order by e.lsn, e.ordinal
limit $4

-- name: items
select key, items, platform_fee from oncepay.payments where key = any ($1::text[])

-- name: blocked
select distinct key from oncepay.event_retries where endpoint = $1 and key = any ($2::text[]) and not dead

-- name: park
insert into oncepay.event_retries (endpoint, id, shard, lsn, ordinal, key, attempts, next_at, problem)
select $1, u.id, u.shard, u.lsn, u.ordinal, u.key, u.attempts, clock_timestamp() + u.gap_s * interval '1 second', u.problem
from unnest($2::text[], $3::text[], $4::pg_lsn[], $5::integer[], $6::text[], $7::integer[], $8::float8[], $9::text[])
     u (id, shard, lsn, ordinal, key, attempts, gap_s, problem)
on conflict (endpoint, id) do nothing

-- name: move_cursor
-- To ($3, $4), from where the page began ($5, $6): a cursor that a replay has set back meanwhile stays there.
insert into oncepay.event_cursors as c (endpoint, shard, lsn, ordinal) values ($1, $2, $3, $4)
on conflict (endpoint, shard) do update set lsn = excluded.lsn, ordinal = excluded.ordinal
where (c.lsn, c.ordinal) = ($5, $6)

-- name: due
-- The first open event of each key, where its time has come.
select e.shard, e.lsn, e.ordinal, e.id, e.type, e.key, e.at, e.data, h.attempts
from (
    select distinct on (key) id, key, attempts, next_at
    from oncepay.event_retries
    where endpoint = $1 and not dead
    order by key, lsn, ordinal) h
join oncepay.events e on e.id = h.id
where h.next_at <= clock_timestamp()
order by h.next_at
limit $2

-- name: next_due
select min(next_at) as next_at, count(*) as open from oncepay.event_retries where endpoint = $1 and not dead

-- name: retry_done
delete from oncepay.event_retries where endpoint = $1 and id = $2

-- name: retry_later
update oncepay.event_retries
set attempts = $3, next_at = clock_timestamp() + $4::float8 * interval '1 second', dead = $5, problem = $6
where endpoint = $1 and id = $2

-- name: log
insert into oncepay.event_deliveries (endpoint, event, type, key, attempt, status, problem, duration_ms)
values ($1, $2, $3, $4, $5, $6, $7, $8)

-- name: deliveries
select n, event, type, key, attempt, at, status, problem, duration_ms
from oncepay.event_deliveries
where endpoint = $1 and ($2::bigint is null or n < $2)
order by n desc
limit $3

-- name: dead_letters
select e.id, e.type, e.key, e.at, r.attempts, r.problem
from oncepay.event_retries r join oncepay.events e on e.id = r.id
where r.endpoint = $1 and r.dead
order by e.at, e.id
limit $2

-- name: revive
update oncepay.event_retries set dead = false, attempts = 0, next_at = clock_timestamp() where endpoint = $1 and dead

-- name: replay_one
insert into oncepay.event_retries (endpoint, id, shard, lsn, ordinal, key, attempts, next_at)
select $1, id, shard, lsn, ordinal, key, 0, clock_timestamp() from oncepay.events where id = $2
on conflict (endpoint, id) do update set dead = false, attempts = 0, next_at = clock_timestamp()
returning id

-- name: replay_since
-- Back to before the first event that was recorded since then, in each shard that has one.
update oncepay.event_cursors c set lsn = f.lsn, ordinal = f.ordinal - 1
from (
    select distinct on (shard) shard, lsn, ordinal from oncepay.events
    where recorded_at >= $2 order by shard, lsn, ordinal) f
where c.endpoint = $1 and c.shard = f.shard and (f.lsn, f.ordinal - 1) < (c.lsn, c.ordinal)
returning c.shard

-- name: forget_retries
delete from oncepay.event_retries where endpoint = $1

-- name: forget_cursors
delete from oncepay.event_cursors where endpoint = $1

-- name: forget_deliveries
delete from oncepay.event_deliveries where endpoint = $1

-- name: prune_events
delete from oncepay.events e
where e.recorded_at < clock_timestamp() - $1::float8 * interval '1 day'
  and not exists (select from oncepay.event_retries r where r.id = e.id and not r.dead)

-- name: prune_dead
delete from oncepay.event_retries r where dead and not exists (select from oncepay.events e where e.id = r.id)

-- name: prune_deliveries
delete from oncepay.event_deliveries where at < clock_timestamp() - $1::float8 * interval '1 day'
