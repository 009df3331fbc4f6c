-- What the shard knows of refunds and disputes, of the payments with these intents ($1).
select slot, key, intent, coalesce(course, progress::text) as progress
from oncepay.payments
where intent = any($1::text[])
