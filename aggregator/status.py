"""What `oncepay aggregator status` asks: how far each feed is, how much there is, the last audit and reconciliation."""

from __future__ import annotations

import datetime as dt

import msgspec
from aiohttp import web

from aggregator import queries
from aggregator.audit import SQL, Audit, AuditState
from aggregator.params import Query
from aggregator.positions import Reader
from oncepay.feed import lsn_text
from oncepay.service import Service, json_response

RECONCILE = queries.load("reconcile.sql")


class FeedStatus(msgspec.Struct, frozen=True):
    """How far a shard's feed is applied; `applied_at` is when (RFC 3339)."""

    shard: str
    position: str
    incarnation: str
    epoch: int
    applied_at: str


class AggregatorStatus(msgspec.Struct, frozen=True):
    """How the aggregator is. `rows` counts about; `audit` is the last round of the process that answers."""

    feeds: list[FeedStatus]
    rows: dict[str, int]
    audit: AuditState
    reconciled_at: str | None
    differences: int | None


class StatusCall:
    """GET /v1/status"""

    def __init__(self, reader: Reader, audit: Audit) -> None:
        self._reader = reader
        self._audit = audit

    def register(self, service: Service) -> None:
        """Serve it; it takes the scope `read`."""
        service.route("GET", "/v1/status", self.status, scope="read")

    async def status(self, request: web.Request) -> web.Response:
        """GET /v1/status"""
        query = Query(request)
        async with self._reader.snapshot(query.min_position()) as (connection, _):
            feeds = [
                FeedStatus(row["shard"], lsn_text(row["lsn"]), row["incarnation"], row["epoch"], _time(row["applied_at"]))
                for row in await connection.fetch(SQL["status"])
            ]
            rows = dict(await connection.fetch(SQL["sizes"]))
            last = await connection.fetchrow(RECONCILE["last_done"])
        done = (_time(last["ended_at"]), last["differences"]) if last else (None, None)
        return json_response(AggregatorStatus(feeds, rows, self._audit.last, *done))


def _time(at: dt.datetime) -> str:
    return at.astimezone(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
