"""The read API: sellers' revenue and balances, buyers' orders, the books as a whole."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from aggregator import cursor, reads
from aggregator.params import Query, path_id
from aggregator.positions import Reader
from aggregator.views import History, Orders, PositionsView, Revenue, SellerBalance, Sellers, Totals
from oncepay.service import Handler, Service, json_response

PATHS = {
    "/v1/sellers/{seller}/revenue": "revenue",
    "/v1/sellers/{seller}/balance": "balance",
    "/v1/buyers/{buyer}/orders": "orders",
    "/v1/payments/{payment}/history": "history",
    "/v1/sellers": "sellers",
    "/v1/totals": "totals",
    "/v1/positions": "positions",
}


class Api:
    """The calls. Each checks what it was given before it waits or reads."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def register(self, service: Service) -> None:
        """Serve them; all need the scope `read`."""
        handlers: Mapping[str, Handler] = {name: getattr(self, name) for name in PATHS.values()}
        for path, name in PATHS.items():
            service.route("GET", path, handlers[name], scope="read")

    async def revenue(self, request: web.Request) -> web.Response:
        """GET /v1/sellers/{seller}/revenue"""
        query, seller = Query(request, "currency", "from", "to", "interval"), path_id(request, "seller")
        currency, (first, last), interval = query.needed_currency(), query.days(), query.interval()
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            rows = await reads.revenue(connection, seller, currency, first, last, interval)
        return json_response(Revenue(seller, currency, interval, rows, positions))

    async def balance(self, request: web.Request) -> web.Response:
        """GET /v1/sellers/{seller}/balance"""
        query, seller = Query(request), path_id(request, "seller")
        async with self._reader.snapshot(query.min_position()) as (connection, positions):
            balances = await reads.balance(connection, seller)
        return json_response(SellerBalance(seller, balances, positions))

    async def orders(self, request: web.Request) -> web.Response:
        """GET /v1/buyers/{buyer}/orders"""
        query, buyer = Query(request, "cursor", "limit"), path_id(request, "buyer")
        text, limit = query.cursor(), query.limit()
        after = cursor.decode(text) if text is not None else None
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

    async def positions(self, request: web.Request) -> web.Response:
        """GET /v1/positions"""
        query = Query(request)
        async with self._reader.snapshot(query.min_position()) as (_, positions):
            return json_response(PositionsView(positions))
