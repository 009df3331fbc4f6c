-- The last payout that the shard has of each seller and currency in certain ranges of slots (their first slots in $1, their last in
-- $2), those that were paid last first.
select seller, currency, max(sequence) as last
from oncepay.payouts
where exists (select from unnest($1::integer[], $2::integer[]) r (first, last) where slot between r.first and r.last)
group by seller, currency
order by max(created_at) desc, seller, currency
