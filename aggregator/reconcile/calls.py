"""The calls about reconciliations: begin one, see how far it is, read what differs."""

from __future__ import annotations

import csv
import datetime as dt
import io
from typing import Annotated

import asyncpg
import msgspec
from aiohttp import web

from aggregator import queries
from aggregator.database import Database
from aggregator.params import Query
from aggregator.reconcile.explain import KINDS
from aggregator.reconcile.office import Office
from oncepay.errors import InvalidField, MalformedBody, NotFound
from oncepay.service import Service, api_key, json_response

SQL = queries.load("reconcile.sql")
RUNS_SHOWN = 50
PAGE = 1_000
COLUMNS = (
    *("kind", "transaction", "key", "entry", "source", "category", "currency", "expected_minor", "actual_minor"),
    *("detail", "cause", "advice"),
)


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """The body of `POST /v1/reconciliations`: UTC days, both inclusive. `grace_s` instead of the setting's."""

    from_: dt.date
    to: dt.date
    grace_s: Annotated[int, msgspec.Meta(ge=0, le=864_000)] | None = None


class Difference(msgspec.Struct, frozen=True):
    """One difference, with its likely cause and what to do. Amounts in minor units of `currency`."""

    n: int
    kind: str
    transaction: str | None
    key: str | None
    entry: str | None
    source: str | None
    category: str | None
    currency: str | None
    expected_minor: int | None
    actual_minor: int | None
    detail: str
    cause: str
    advice: str


class Differences(msgspec.Struct, frozen=True):
    """A page of differences. `cursor` gives the next page; null on the last one."""

    differences: list[Difference]
    cursor: str | None


class Reconciliation(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """A run over the time from `from` (inclusive) to `to` (exclusive). `state`: running, done, failed (`problem` says why).

    `checked` counts what was looked at; `kinds` the differences by kind, once it has ended.
    """

    id: str
    state: str
    from_: str
    to: str
    asked_by: str
    started_at: str
    ended_at: str | None
    checked: dict[str, int]
    differences: int | None
    kinds: dict[str, int]
    problem: str | None


class Reconciliations(msgspec.Struct, frozen=True):
    """The latest runs, newest first."""

    reconciliations: list[Reconciliation]


class ReconcileCalls:
    """Served by every aggregator; a run is known to all of them by the database."""

    def __init__(self, office: Office, database: Database) -> None:
        self._office = office
        self._database = database

    def register(self, service: Service) -> None:
        """Beginning one takes the scope `operate`, reading the scope `read`."""
        service.route("POST", "/v1/reconciliations", self.begin, scope="operate")
        service.route("GET", "/v1/reconciliations", self.runs, scope="read")
        service.route("GET", "/v1/reconciliations/{id}", self.run, scope="read")
        service.route("GET", "/v1/reconciliations/{id}/differences", self.differences, scope="read")
        service.route("GET", "/v1/reconciliations/{id}/differences.csv", self.differences_csv, scope="read")

    async def begin(self, request: web.Request) -> web.Response:
        """POST /v1/reconciliations"""
        try:
            asked = msgspec.json.decode(await request.read(), type=Asked)
        except msgspec.DecodeError as error:
            raise MalformedBody(str(error)) from None
        if asked.to > dt.datetime.now(dt.UTC).date():
            raise InvalidField("the period ends in the future", field="to")
        first, last = (dt.datetime.combine(day, dt.time(), dt.UTC) for day in (asked.from_, asked.to))
        name = await self._office.start(first, last + dt.timedelta(days=1), api_key(request).name, grace_s=asked.grace_s)
        return json_response(await self._one(name), status=202)

    async def runs(self, request: web.Request) -> web.Response:
        """GET /v1/reconciliations"""
        async with self._database.connection("read") as connection:
            rows = await connection.fetch(SQL["runs"], None, RUNS_SHOWN)
            found = [_run(row, {}) for row in rows]
        return json_response(Reconciliations(found))

    async def run(self, request: web.Request) -> web.Response:
        """GET /v1/reconciliations/{id}"""
        return json_response(await self._one(request.match_info["id"]))

    async def _one(self, name: str) -> Reconciliation:
        async with self._database.connection("read") as connection:
            row = await connection.fetchrow(SQL["runs"], name, 1)
            if row is None:
                raise NotFound(f"there is no reconciliation {name}")
            return _run(row, dict(await connection.fetch(SQL["kinds"], name)))

    async def differences(self, request: web.Request) -> web.Response:
        """GET /v1/reconciliations/{id}/differences"""
        query = Query(request, "cursor", "limit")
        limit, text = query.limit(default=PAGE, most=PAGE), query.cursor() or "0"
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InvalidField("this is not a cursor that an earlier page gave", field="cursor")
        name = (await self._one(request.match_info["id"])).id
        async with self._database.connection("read") as connection:
            rows = await connection.fetch(SQL["differences"], name, int(text), limit + 1)
        page = [_difference(row) for row in rows[:limit]]
        return json_response(Differences(page, str(page[-1].n) if len(rows) > limit else None))

    async def differences_csv(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/reconciliations/{id}/differences.csv"""
        name = (await self._one(request.match_info["id"])).id
        response = web.StreamResponse()
        response.content_type, response.charset = "text/csv", "utf-8"
        await response.prepare(request)
        await response.write(_csv([COLUMNS]))
        after = 0
        while True:
            async with self._database.connection("read") as connection:
                rows = await connection.fetch(SQL["differences"], name, after, PAGE)
            if not rows:
                break
            after = rows[-1]["n"]
            await response.write(_csv([msgspec.structs.astuple(_difference(row))[1:] for row in rows]))
        await response.write_eof()
        return response


def _run(row: asyncpg.Record, kinds: dict[str, int]) -> Reconciliation:
    return Reconciliation(
        row["id"], row["state"], _time(row["first"]), _time(row["last"]), row["asked_by"], _time(row["started_at"]),
        _time(row["ended_at"]) if row["ended_at"] else None, msgspec.json.decode(row["checked"]), row["differences"], kinds,
        row["problem"],
    )  # fmt: skip


def _difference(row: asyncpg.Record) -> Difference:
    return msgspec.convert({**dict(row), **KINDS[row["kind"]]._asdict()}, Difference)


def _time(at: dt.datetime) -> str:
    return at.astimezone(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _csv(rows: object) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)  # type: ignore[arg-type]
    return text.getvalue().encode()
