-- Write a seller; parameters as in migration 0004.
select outcome, key, payee, currency, basis_points, fixed_minor, version, created_at, updated_at
from oncepay.put_seller($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
