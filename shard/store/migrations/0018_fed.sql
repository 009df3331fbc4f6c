-- Whether the aggregator ever had something of this shard's feed. One that knows no position afterwards has lost it: the feed must not
-- begin anew at wherever its slot stands, as that of a new shard does.
alter table oncepay.worker_epoch add column fed boolean not null default false;

create function oncepay.feed_applied(p_epoch bigint) returns boolean language plpgsql volatile as $$
begin
    perform pg_advisory_xact_lock_shared(2, 0);
    if not exists (select from oncepay.worker_epoch where epoch = p_epoch) then
        raise exception 'epoch % is over', p_epoch using errcode = 'OP001';
    end if;
    update oncepay.worker_epoch set fed = true where not fed;
    perform pg_logical_emit_message(true, 'oncepay', 'feed applied');
    return true;
end $$;
revoke execute on function oncepay.feed_applied from public;
grant execute on function oncepay.feed_applied to oncepay_worker;
