-- Write payouts; parameters as in migration 0008.
select oncepay.put_payouts($1, $2, $3, $4, $5::jsonb, $6)::text
