"""The calls about event endpoints: make, change and remove them, see what was delivered, have it sent again."""

from __future__ import annotations

import contextlib
import datetime as dt
import re
from typing import TypeVar

import msgspec
from aiohttp import web

from aggregator import queries
from aggregator.database import Database
from aggregator.events.deliver import Sender
from aggregator.events.endpoints import Endpoint, Endpoints, new_endpoint, rolled
from aggregator.events.guard import check_url
from aggregator.params import ROWS_MAX, Query
from oncepay.errors import InvalidField, MalformedBody, NotFound, OncepayError
from oncepay.etcd import EtcdOutcomeUnknown
from oncepay.service import Service, json_response

SQL = queries.load("events.sql")
TYPES_MAX = 50
DESCRIPTION_CHARACTERS = 200
T = TypeVar("T")
_TYPE = re.compile(r"[a-z]+\.(?:\*|[a-z_]+)")


class NewEndpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /v1/event-endpoints`. No `types` are all; `payment.*` are all of payments."""

    url: str
    types: list[str] = []
    description: str = ""


class EndpointChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `PATCH /v1/event-endpoints/{id}`: what is given changes."""

    url: str | None = None
    types: list[str] | None = None
    description: str | None = None
    enabled: bool | None = None


class Replay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /v1/event-endpoints/{id}/replay`: exactly one of them."""

    since: dt.datetime | None = None
    event: str | None = None
    dead_letters: bool = False


class EndpointView(msgspec.Struct, frozen=True):
    """An event endpoint. `secret` is shown once, when it was made. `reason` says why it was turned off by itself."""

    id: str
    url: str
    types: list[str]
    description: str
    enabled: bool
    reason: str
    created_at: str
    secret: str | msgspec.UnsetType = msgspec.UNSET


class EndpointList(msgspec.Struct, frozen=True):
    """All event endpoints, oldest first."""

    endpoints: list[EndpointView]


class Delivery(msgspec.Struct, frozen=True):
    """One try: `status` is what the endpoint answered (null: nothing), `problem` is empty for a 2xx."""

    n: int
    event: str
    type: str
    key: str
    attempt: int
    at: str
    status: int | None
    problem: str
    duration_ms: int


class Deliveries(msgspec.Struct, frozen=True):
    """A page of the delivery log, newest first. `cursor` gives the next page; null on the last one."""

    deliveries: list[Delivery]
    cursor: str | None


class DeadLetter(msgspec.Struct, frozen=True):
    """An event that was given up, after three days."""

    event: str
    type: str
    key: str
    at: str
    attempts: int
    problem: str


class DeadLetters(msgspec.Struct, frozen=True):
    """The events that were given up, oldest first."""

    dead_letters: list[DeadLetter]


class Replayed(msgspec.Struct, frozen=True):
    """What will be sent again: `shards` whose events begin anew, or `events` one by one."""

    shards: list[str] = []
    events: int = 0


class EventCalls:
    """Endpoints are the deployment's: all calls take the scope `operate`."""

    def __init__(self, endpoints: Endpoints, database: Database, sender: Sender, *, allow_private: bool) -> None:
        self._endpoints = endpoints
        self._database = database
        self._sender = sender
        self._allow_private = allow_private

    def register(self, service: Service) -> None:
        """Serve them."""
        path = "/v1/event-endpoints"
        service.route("POST", path, self.make, scope="operate")
        service.route("GET", path, self.list, scope="operate")
        service.route("GET", path + "/{id}", self.show, scope="operate")
        service.route("PATCH", path + "/{id}", self.change, scope="operate")
        service.route("DELETE", path + "/{id}", self.remove, scope="operate")
        service.route("POST", path + "/{id}/secret", self.roll, scope="operate")
        service.route("POST", path + "/{id}/replay", self.replay, scope="operate")
        service.route("GET", path + "/{id}/deliveries", self.deliveries, scope="operate")
        service.route("GET", path + "/{id}/dead-letters", self.dead_letters, scope="operate")

    async def make(self, request: web.Request) -> web.Response:
        """POST /v1/event-endpoints: the cursors first, since a record without them is sent all that is kept."""
        body = _decoded(await request.read(), NewEndpoint)
        url = check_url(body.url, allow_private=self._allow_private)
        made = new_endpoint(url, _types(body.types), _description(body.description))
        async with self._database.connection("work") as connection:
            await connection.execute(SQL["begin_cursors"], made.id)
        try:
            await self._endpoints.add(made)
        except EtcdOutcomeUnknown:
            raise  # the record may be there, or come yet
        except OncepayError:
            with contextlib.suppress(NotFound):
                await self._endpoints.remove(made.id)
            await self._forget(made.id)
            raise
        return json_response(_view(made, secret=True), status=201)

    async def list(self, request: web.Request) -> web.Response:
        """GET /v1/event-endpoints"""
        return json_response(EndpointList([_view(endpoint) for endpoint in self._endpoints.all()]))

    async def show(self, request: web.Request) -> web.Response:
        """GET /v1/event-endpoints/{id}"""
        return json_response(_view((await self._endpoints.read(request.match_info["id"]))[0]))

    async def change(self, request: web.Request) -> web.Response:
        """PATCH /v1/event-endpoints/{id}"""
        body = _decoded(await request.read(), EndpointChange)
        given = {name: getattr(body, name) for name in ("url", "types", "description", "enabled")}
        changes = {name: value for name, value in given.items() if value is not None}
        if "url" in changes:
            check_url(changes["url"], allow_private=self._allow_private)
        if "types" in changes:
            changes["types"] = _types(changes["types"])
        if "description" in changes:
            _description(changes["description"])
        if changes.get("enabled"):
            changes["reason"] = ""
        changed = await self._endpoints.change(
            request.match_info["id"], lambda endpoint: msgspec.structs.replace(endpoint, **changes)
        )
        return json_response(_view(changed))

    async def remove(self, request: web.Request) -> web.Response:
        """DELETE /v1/event-endpoints/{id}"""
        name = request.match_info["id"]
        await self._endpoints.remove(name)
        await self._forget(name)
        return web.Response(status=204)

    async def _forget(self, name: str) -> None:
        async with self._database.connection("work") as connection:
            for statement in ("forget_retries", "forget_cursors", "forget_deliveries"):
                await connection.execute(SQL[statement], name)

    async def roll(self, request: web.Request) -> web.Response:
        """POST /v1/event-endpoints/{id}/secret"""
        return json_response(_view(await self._endpoints.change(request.match_info["id"], rolled), secret=True))

    async def replay(self, request: web.Request) -> web.Response:
        """POST /v1/event-endpoints/{id}/replay"""
        body = _decoded(await request.read(), Replay)
        if (body.since is not None) + (body.event is not None) + body.dead_letters != 1:
            raise InvalidField("say one of them: since, event, dead_letters", field="since")
        if body.since is not None and body.since.tzinfo is None:
            raise InvalidField("a time has an offset, as 2026-11-25T12:00:00Z", field="since")
        name = (await self._endpoints.read(request.match_info["id"]))[0].id
        async with self._database.connection("work") as connection:
            if body.since is not None:
                shards = [row["shard"] for row in await connection.fetch(SQL["replay_since"], name, body.since)]
                done = Replayed(shards=sorted(shards))
            elif body.event is not None:
                if await connection.fetchval(SQL["replay_one"], name, body.event) is None:
                    raise NotFound(f"there is no event {body.event}; events are kept for 30 days")
                done = Replayed(events=1)
            else:
                done = Replayed(events=int((await connection.execute(SQL["revive"], name)).rpartition(" ")[2]))
        self._sender.poke()
        return json_response(done, status=202)

    async def deliveries(self, request: web.Request) -> web.Response:
        """GET /v1/event-endpoints/{id}/deliveries"""
        query = Query(request, "cursor", "limit")
        limit, text = query.limit(), query.cursor()
        if text is not None and not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InvalidField("this is not a cursor that an earlier page gave", field="cursor")
        name = (await self._endpoints.read(request.match_info["id"]))[0].id
        async with self._database.connection("read") as connection:
            rows = await connection.fetch(SQL["deliveries"], name, int(text) if text else None, limit + 1)
        page = [msgspec.convert({**dict(row), "at": _shown(row["at"])}, Delivery) for row in rows[:limit]]
        return json_response(Deliveries(page, str(page[-1].n) if len(rows) > limit else None))

    async def dead_letters(self, request: web.Request) -> web.Response:
        """GET /v1/event-endpoints/{id}/dead-letters"""
        name = (await self._endpoints.read(request.match_info["id"]))[0].id
        async with self._database.connection("read") as connection:
            rows = await connection.fetch(SQL["dead_letters"], name, ROWS_MAX)
        found = [DeadLetter(id_, type_, key, _shown(at), attempts, problem) for id_, type_, key, at, attempts, problem in rows]
        return json_response(DeadLetters(found))


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise MalformedBody(str(error)) from None


def _types(types: list[str]) -> tuple[str, ...]:
    if len(types) > TYPES_MAX:
        raise InvalidField(f"an endpoint names at most {TYPES_MAX} types", field="types")
    for type_ in types:
        if not _TYPE.fullmatch(type_):
            raise InvalidField(f"{type_!r} is no type like payment.succeeded or payment.*", field="types")
    return tuple(dict.fromkeys(types))


def _description(text: str) -> str:
    if len(text) > DESCRIPTION_CHARACTERS or (text and not text.isprintable()):
        raise InvalidField(f"a description has at most {DESCRIPTION_CHARACTERS} printable characters", field="description")
    return text


def _view(endpoint: Endpoint, *, secret: bool = False) -> EndpointView:
    made = dt.datetime.fromtimestamp(endpoint.created_at_ms / 1000, dt.UTC)
    shown = endpoint.secrets[0].value if secret else msgspec.UNSET
    return EndpointView(
        endpoint.id, endpoint.url, list(endpoint.types), endpoint.description, endpoint.enabled, endpoint.reason, _shown(made),
        shown,
    )  # fmt: skip


def _shown(at: dt.datetime) -> str:
    return at.astimezone(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
