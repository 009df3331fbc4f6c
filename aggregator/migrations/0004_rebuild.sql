-- Rebuilding what is derived from one shard: forgetting comes first, in the transaction that brings everything anew. A table
-- that is derived from the feed is forgotten here too.

-- Forget what is derived of `p_slots`, whoever brought it, and the sums of `p_shard` and of all others that lose entries by it.
-- Returns these shards: their sums are to be made again from the entries that are left. Their watermarks stay locked.
create function oncepay.forget_slots(p_shard text, p_slots int4multirange) returns setof text
    language plpgsql volatile security definer set search_path = pg_catalog as $$
declare
    affected text[];
begin
    affected := array(
        select p_shard union select distinct shard from oncepay.entries where slot <@ p_slots order by 1);
    perform from oncepay.watermarks where shard = any (affected) order by shard for update;
    delete from oncepay.balance_links where slot <@ p_slots;
    delete from oncepay.entries where slot <@ p_slots;
    delete from oncepay.payments where slot <@ p_slots;
    delete from oncepay.seller_days where shard = any (affected);
    delete from oncepay.account_totals where shard = any (affected);
    delete from oncepay.kind_totals where shard = any (affected);
    return query select unnest(affected);
end $$;

-- Forget versions that the rebuilt payments don't have: they belong to a history that was abandoned.
create function oncepay.forget_versions(p_slots int4multirange) returns void
    language sql volatile security definer set search_path = pg_catalog as $$
    delete from oncepay.payment_history h
    where h.slot <@ p_slots
      and not exists (select from oncepay.payments p where p.key = h.key and p.version >= h.version);
$$;

revoke execute on function oncepay.forget_slots, oncepay.forget_versions from public;
grant execute on function oncepay.forget_slots, oncepay.forget_versions to oncepay_aggregator;
