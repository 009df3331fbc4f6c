-- $1 settled payments that are as the newest settled ones of the router, each with its entries and links, under keys of their own.
-- A superuser runs this on the leader; nothing of it waits for the quorum. `first` numbers them, so that no key comes twice.
with pattern as (
    select p.*, row_number() over () as number, count(*) over () as patterns
    from (select * from oncepay.payments where status = 'succeeded' order by created_at desc limit 64) p
), made as (
    select pattern.key as old_key, pattern.slot as old_slot, pattern.*,
           'grown-' || encode(substr(sha256(int8send(n)), 1, 18), 'base64') as new_key,
           'pi_3' || substr(encode(sha256(int8send(-n)), 'hex'), 1, 23) as new_intent,
           now() - interval '30 days' + n * interval '10 milliseconds' as at
    from generate_series($2::bigint + 1, $2::bigint + $1::bigint) n
    join pattern on pattern.number = n % pattern.patterns + 1
), payments as (
    insert into oncepay.payments (
        slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, intent, fingerprint, agreed, course,
        open_work, disputed, event, actor, created_at, updated_at, expires_at)
    select oncepay.slot_of(new_key), new_key, status, version, buyer, currency, amount, amount_captured, amount_refunded,
           new_intent, fingerprint, agreed, course, open_work, disputed, event, actor, at, at, at + interval '1 day'
    from made
    where exists (select from oncepay.ranges r where oncepay.slot_of(new_key) between r.first and r.last)
), entries as (
    insert into oncepay.entries (
        slot, key, entry_id, kind, currency, source, accounts, amounts, sellers, created_at, balance_transaction, fee)
    select oncepay.slot_of(m.new_key), m.new_key, e.entry_id, e.kind, e.currency, e.source, e.accounts, e.amounts, e.sellers, m.at,
           case when e.balance_transaction is not null then 'txn_3' || substr(encode(sha256(m.new_key::bytea), 'hex'), 1, 23) end, e.fee
    from made m join oncepay.entries e on e.slot = m.old_slot and e.key = m.old_key
)
insert into oncepay.balance_links (slot, key, entry_id, balance_transaction, created_at)
select oncepay.slot_of(m.new_key), m.new_key, l.entry_id, 'txn_3' || substr(encode(sha256(m.new_key::bytea), 'hex'), 1, 23), m.at
from made m join oncepay.balance_links l on l.slot = m.old_slot and l.key = m.old_key
