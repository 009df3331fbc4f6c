"""The read API: sellers' revenue, balances and statements, buyers' orders, the books as a whole."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Mapping

from aiohttp import web

from aggregator import cursor, reads, statement
from aggregator.params import ROWS_MAX, Query, path_id
from aggregator.positions import Reader
from aggregator.views import (
    History,
    Orders,
    PositionsView,
    Profit,
    Revenue,
    SellerBalance,
    Sellers,
    Statement,
    Totals,
    TrialBalance,
)
from oncepay.feed import lsn_text
from oncepay.service import Handler, Service, json_response

PATHS = {
    "/v1/sellers/{seller}/revenue": "revenue",
    "/v1/sellers/{seller}/balance": "balance",
    "/v1/sellers/{seller}/statement": "statement",
    "/v1/sellers/{seller}/statement.csv": "statement_csv",
    "/v1/buyers/{buyer}/orders": "orders",
    "/v1/payments/{payment}/history": "history",
    "/v1/sellers": "sellers",
    "/v1/totals": "totals",
    "/v1/trial-balance": "trial_balance",
    "/v1/profit": "profit",
    "/v1/positions": "positions",
}
CSV_S = 120.0
"""A statement as CSV is read to its end within this time, or cut off: it holds a connection of the database."""


class Api:
    """The calls. Each checks what it was given before it waits or reads. `hold_s`: how long a payment's money is pending."""

    def __init__(self, reader: Reader, *, hold_s: float) -> None:
        self._reader = reader
        self._hold = dt.timedelta(seconds=hold_s)

    def register(self, service: Service) -> None:
        """Serve them; all need the scope `read`, and those of one seller are open to that seller's own key."""
        handlers: Mapping[str, Handler] = {name: getattr(self, name) for name in PATHS.values()}
        for path, name in PATHS.items():
            service.route("GET", path, handlers[name], scope="read", seller_member="seller" if "{seller}" in path else "")

    async def revenue(self, request: web.Request) -> web.Response:
        """GET /v1/sellers/{seller}/revenue"""
        query = Query(request, "currency", "from", "to", "interval", "timezone", "limit", "cursor")
        seller, currency, span = path_id(request, "seller"), query.needed_currency(), query.span()
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            rows, following = await reads.revenue(connection, seller, currency, span)
        return json_response(Revenue(seller, currency, span.interval, rows, positions, span.timezone, following))

    async def balance(self, request: web.Request) -> web.Response:
        """GET /v1/sellers/{seller}/balance"""
        query, seller = Query(request), path_id(request, "seller")
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            balances = await reads.balance(connection, seller, dt.datetime.now(dt.UTC) - self._hold)
        return json_response(SellerBalance(seller, balances, positions))

    async def statement(self, request: web.Request) -> web.Response:
        """GET /v1/sellers/{seller}/statement"""
        query = Query(request, "currency", "from", "to", "timezone", "limit", "cursor")
        seller, currency, days = path_id(request, "seller"), query.needed_currency(), query.days()
        timezone, text, limit = query.timezone(), query.cursor(), query.limit(default=ROWS_MAX, most=ROWS_MAX)
        given = cursor.decode(text, cursor.EntryCursor) if text is not None else None
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            of = await statement.period(connection, seller, currency, days, timezone)
            after = given or of.start
            before = await statement.opening(connection, of, after)
            entries, following = await statement.page(connection, of, after, before, limit)
        closing = entries[-1].balance if entries else before
        final = of.final(dt.datetime.now(dt.UTC))
        next_page = following.encode() if following else None
        return json_response(Statement(seller, currency, timezone, *days, before, entries, closing, final, next_page, positions))

    async def statement_csv(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/sellers/{seller}/statement.csv"""
        query = Query(request, "currency", "from", "to", "timezone")
        seller, currency = path_id(request, "seller"), query.needed_currency()
        days, timezone = query.days(), query.timezone()
        async with self._reader.snapshot(query.min_position()) as (connection, _):
            of = await statement.period(connection, seller, currency, days, timezone)
            pieces = statement.lines(connection, of)
            first = await anext(pieces)
            response = web.StreamResponse()
            response.content_type, response.charset = "text/csv", "utf-8"
            response.headers["Content-Disposition"] = 'attachment; filename="statement.csv"'
            async with asyncio.timeout(CSV_S):
                await response.prepare(request)
                await response.write(first)
                async for piece in pieces:
                    await response.write(piece)
                await response.write_eof()
        return response

    async def orders(self, request: web.Request) -> web.Response:
        """GET /v1/buyers/{buyer}/orders"""
        query, buyer = Query(request, "cursor", "limit"), path_id(request, "buyer")
        text, limit = query.cursor(), query.limit()
        after = cursor.decode(text, cursor.Cursor) if text is not None else None
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            page, following = await reads.orders(connection, buyer, after, limit)
        return json_response(Orders(buyer, page, following.encode() if following else None, positions))

    async def history(self, request: web.Request) -> web.Response:
        """GET /v1/payments/{payment}/history"""
        query, key = Query(request), path_id(request, "payment")
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            versions = await reads.history(connection, key)
        return json_response(History(key, versions, positions))

    async def sellers(self, request: web.Request) -> web.Response:
        """GET /v1/sellers"""
        query = Query(request, "currency", "limit")
        currency, limit = query.currency(), query.limit()
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            top = await reads.sellers(connection, currency, limit)
        return json_response(Sellers(top, positions))

    async def totals(self, request: web.Request) -> web.Response:
        """GET /v1/totals"""
        query = Query(request)
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            currencies, accounts = await reads.totals(connection)
        return json_response(Totals(currencies, accounts, positions))

    async def trial_balance(self, request: web.Request) -> web.Response:
        """GET /v1/trial-balance"""
        query = Query(request, "currency", "at")
        currency, at, wanted = query.currency(), query.at(), query.min_position()
        for shard, lsn in at.items():
            wanted[shard] = max(lsn, wanted.get(shard, 0))
        async with self._reader.snapshot(wanted) as (connection, positions):
            currencies = await reads.trial_balance(connection, currency, at)
        return json_response(TrialBalance(currencies, positions | {shard: lsn_text(lsn) for shard, lsn in at.items()}))

    async def profit(self, request: web.Request) -> web.Response:
        """GET /v1/profit"""
        query = Query(request, "currency", "from", "to", "interval", "limit", "cursor")
        currency, span = query.needed_currency(), query.span()
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            rows, following = await reads.profit(connection, currency, span)
        return json_response(Profit(currency, span.interval, rows, positions, following))

    async def positions(self, request: web.Request) -> web.Response:
        """GET /v1/positions"""
        query = Query(request)
        async with self._reader.snapshot(query.min_position()) as (_, positions):
            return json_response(PositionsView(positions))
