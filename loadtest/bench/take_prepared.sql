-- Takes $1 keys that nobody else is taking.
delete from prepared_keys
where id = any (array(select id from prepared_keys order by id limit $1 for update skip locked))
returning key
