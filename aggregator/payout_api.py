"""The payout calls: a run, approval, one payout, lists."""

from __future__ import annotations

import asyncpg
from aiohttp import web

from aggregator import cursor, queries
from aggregator.params import Query, path_id
from aggregator.payout_views import (
    BookBody,
    DeclineBody,
    EntryView,
    OnePayout,
    PayoutPage,
    PayoutView,
    PostingView,
    RunBody,
    SellerPayouts,
    derived_view,
    payout_view,
)
from aggregator.positions import Reader
from aggregator.runs import Runs
from oncepay.cart import SELLER_LENGTH_MAX
from oncepay.errors import Forbidden, InvalidField, InvalidKey, NotFound
from oncepay.money import exponent
from oncepay.payout import Payout, PayoutStatus, parse_key
from oncepay.payout_moves import Approved, BookedByHand, Declined, PayoutEvent
from oncepay.service import Service, api_key, decode, json_response
from shard.store.payouts import PayoutStore, StalePayout

SELLERS_MAX = 10_000
"""Sellers that a run may name."""
TEXT_MAX = 500
TRIES = 5

SQL = queries.load("payouts.sql")


class PayoutCalls:
    """The handlers."""

    def __init__(self, reader: Reader, store: PayoutStore, runs: Runs, *, auth: bool) -> None:
        self._auth = auth
        self._reader = reader
        self._store = store
        self._runs = runs

    def register(self, service: Service) -> None:
        """Serve them."""
        service.route("POST", "/v1/payouts", self.run, scope="operate")
        service.route("GET", "/v1/payouts", self.list, scope="read")
        service.route("GET", "/v1/payouts/{key}", self.show, scope="read")
        service.route("POST", "/v1/payouts/{key}/approve", self.approve, scope="operate")
        service.route("POST", "/v1/payouts/{key}/decline", self.decline, scope="operate")
        service.route("POST", "/v1/payouts/{key}/book", self.book, scope="operate")
        service.route("GET", "/v1/sellers/{seller}/payouts", self.of_seller, scope="read", seller_member="seller")

    async def run(self, request: web.Request) -> web.Response:
        """POST /v1/payouts: a run. 201 when it made something, 200 when there was nothing to make."""
        body = await decode(request, RunBody)
        if body.currency is not None:
            exponent(body.currency)
        sellers = body.sellers
        if sellers is not None and not 1 <= len(sellers) <= SELLERS_MAX:
            raise InvalidField(f"name 1 to {SELLERS_MAX} sellers, or none for all", field="sellers")
        if sellers is not None and any(not 1 <= len(name) <= SELLER_LENGTH_MAX or "\0" in name for name in sellers):
            raise InvalidField(f"a seller's id has 1 to {SELLER_LENGTH_MAX} printable characters", field="sellers")
        by = api_key(request).name
        view = await self._runs.run(by, dry_run=body.dry_run, currency=body.currency, sellers=sellers)
        return json_response(view, 201 if view.payouts and not view.dry_run else 200)

    async def list(self, request: web.Request) -> web.Response:
        """GET /v1/payouts"""
        query = Query(request, "seller", "currency", "status", "run", "cursor", "limit")
        seller, currency, status = query.text("seller"), query.currency(), query.text("status")
        if status is not None and status not in set(PayoutStatus):
            raise InvalidField(f"{status!r} is none of {', '.join(PayoutStatus)}", field="status")
        text, limit = query.cursor(), query.limit()
        after = cursor.decode(text, cursor.Cursor) if text is not None else None
        place = (after.created_at, after.key) if after else (None, None)
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            rows = await connection.fetch(SQL["list"], seller, currency, status, query.text("run"), *place, limit + 1)
        page, following = _page(rows, limit)
        return json_response(PayoutPage(page, following, positions))

    async def of_seller(self, request: web.Request) -> web.Response:
        """GET /v1/sellers/{seller}/payouts"""
        query, seller = Query(request, "currency", "cursor", "limit"), path_id(request, "seller")
        text, limit = query.cursor(), query.limit()
        after = cursor.decode(text, cursor.Cursor) if text is not None else None
        place = (after.created_at, after.key) if after else (None, None)
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            rows = await connection.fetch(SQL["of_seller"], seller, query.currency(), *place, limit + 1)
        page, following = _page(rows, limit)
        return json_response(SellerPayouts(seller, page, following, positions))

    async def show(self, request: web.Request) -> web.Response:
        """GET /v1/payouts/{key}, from its shard, behind the barrier."""
        key = _key(request)
        found = await self._store.get_with_entries(key)
        if found is None:
            raise NotFound(f"there is no payout {key}")
        payout, entries = found
        shown = [
            EntryView(
                entry.entry_id,
                entry.kind,
                entry.currency,
                [PostingView(account, amount) for account, amount in zip(entry.accounts, entry.amounts, strict=True)],
            )
            for entry in entries
        ]
        return json_response(OnePayout(payout_view(payout), shown))

    async def approve(self, request: web.Request) -> web.Response:
        """POST /v1/payouts/{key}/approve: a second operator agrees."""
        if not self._auth:
            raise Forbidden("who approves can't be told from who started the run: this deployment has no API keys")
        return await self._command(request, Approved(api_key(request).name), "approved")

    async def decline(self, request: web.Request) -> web.Response:
        """POST /v1/payouts/{key}/decline: it is stopped, and the seller's balance is what it was."""
        body = await decode(request, DeclineBody) if request.can_read_body else DeclineBody()
        if len(body.reason) > TEXT_MAX or "\0" in body.reason:
            raise InvalidField(f"a reason has at most {TEXT_MAX} characters", field="reason")
        return await self._command(request, Declined(api_key(request).name, body.reason), "declined")

    async def book(self, request: web.Request) -> web.Response:
        """POST /v1/payouts/{key}/book: it was paid outside of Tipalti."""
        body = await decode(request, BookBody)
        if not 1 <= len(body.reference) <= TEXT_MAX or not body.reference.isprintable():
            raise InvalidField(f"a reference has 1 to {TEXT_MAX} printable characters", field="reference")
        return await self._command(request, BookedByHand(api_key(request).name, body.reference), "booked by hand")

    async def _command(self, request: web.Request, event: PayoutEvent, name: str) -> web.Response:
        key = _key(request)
        payout = await self._store.get(key)
        if payout is None:
            raise NotFound(f"there is no payout {key}")
        return json_response(payout_view(await self._applied(payout, event, name)))

    async def _applied(self, payout: Payout, event: PayoutEvent, name: str) -> Payout:
        """Commit the event on the row, as it is when it is reached: `move` decides on that one."""
        for _ in range(TRIES - 1):
            try:
                return await self._store.apply(payout, event, event=name)
            except StalePayout as stale:
                payout = stale.payout
        return await self._store.apply(payout, event, event=name)


def _key(request: web.Request) -> str:
    key = request.match_info["key"]
    try:
        parse_key(key)
    except InvalidKey:
        raise NotFound(f"there is no payout {key[:200]!r}: a key is payout:<seller>:<currency>:<sequence>") from None
    return key


def _page(rows: list[asyncpg.Record], limit: int) -> tuple[list[PayoutView], str | None]:
    page = [derived_view(row) for row in rows[:limit]]
    if len(rows) <= limit:
        return page, None
    last = rows[limit - 1]
    return page, cursor.Cursor(last["created_at"], last["key"]).encode()
