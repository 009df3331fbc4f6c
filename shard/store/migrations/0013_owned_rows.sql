-- The role that deletes what was moved away can't delete a row of a range that this shard owns: not by a mistake in what calls it,
-- and not by hand.

create function oncepay.refuse_owned_delete() returns trigger language plpgsql as $$
begin
    if current_user = 'oncepay_mover'
       and exists (select from gone g join oncepay.ranges r on g.slot between r.first and r.last) then
        raise exception '% has rows of slots that this shard owns: DELETE refused', tg_table_name
            using errcode = 'integrity_constraint_violation', constraint = 'append_only';
    end if;
    return null;
end $$;
revoke execute on function oncepay.refuse_owned_delete from public;

create or replace function oncepay.ready_for_streams() returns integer language plpgsql volatile as $$
declare
    item record;
    query text;
    made integer := 0;
begin
    for item in
        select * from oncepay.slot_tables t
        where not exists (select from pg_trigger g where g.tgrelid = t.relid and g.tgname = 'zz_refuse_owned_delete')
    loop
        if not exists (select from pg_trigger g where g.tgrelid = item.relid and g.tgname = 'zz_skip_existing') then
            query := format('select exists (select from oncepay.%I t where %s)', item.name,
                            (select string_agg(format('t.%1$I = ($1).%1$I', c), ' and ') from unnest(item.key_columns) c));
            execute format('create trigger zz_skip_existing before insert on oncepay.%I for each row
                            execute function oncepay.skip_existing(%L)', item.name, query);
            execute format('alter table oncepay.%I enable replica trigger zz_skip_existing', item.name);
            execute format('grant select, delete on oncepay.%I to oncepay_mover', item.name);
        end if;
        execute format('create trigger zz_refuse_owned_delete after delete on oncepay.%I referencing old table as gone
                        for each statement execute function oncepay.refuse_owned_delete()', item.name);
        made := made + 1;
    end loop;
    return made;
end $$;
select oncepay.ready_for_streams();
