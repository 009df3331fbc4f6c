-- A page, newest first, before ($1, $2). Filters: $3 buyer, $4 seller, $5 status (null: any). At most $6 rows are shown of at
-- most $7 that are read; when that many were read, the last of them comes marked as `passed`, to go on from there. $8: how a line of
-- the seller begins in `agreed`, so that few texts have to be parsed.
with read as (
    select p.*, row_number() over (order by created_at desc, key collate "C" desc) as n
    from (
        select * from oncepay.payments i
        where exists (select from oncepay.ranges r where i.slot between r.first and r.last)  -- no copy of a move
          and (created_at, key collate "C") < ($1::timestamptz, $2::text)
          and /* buyer */ ($3::text is null)
        order by created_at desc, key collate "C" desc
        limit $7
    ) p
), shown as (
    select * from read
    where case
            when $4::text is null then true
            when agreed is null or left(agreed, 1) = '{' then
                coalesce(agreed::jsonb, terms) -> 'shares' @> jsonb_build_array(jsonb_build_object('seller', $4::text))
            else strpos(agreed, $8::text) > 0
                and exists (select from jsonb_array_elements(agreed::jsonb -> 0) line where line ->> 0 = $4)
          end
      and ($5::text is null or status = $5)
    order by n
    limit $6
)
select slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, intent, fingerprint,
       coalesce(agreed, terms::text) as terms, coalesce(course, progress::text) as progress, created_at, updated_at, expires_at, passed
from (
    select *, false as passed from shown
    union all
    select *, true from read where n = $7 and (select count(*) from shown) < $6
) page
order by n, passed
