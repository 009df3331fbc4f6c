"""The feed's door: workers post batches here and ask how far a shard is. Only they know the secret."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Sequence

import msgspec
from aiohttp import web

from aggregator import apply, metrics
from aggregator.database import Database
from aggregator.params import path_id
from aggregator.positions import Reader
from aggregator.rebuild import rebuild
from oncepay.errors import BodyTooLarge, MalformedBody, Unauthorized
from oncepay.feed import (
    FEED_BYTES_MAX,
    EntryRow,
    FeedAnswer,
    FeedBatch,
    LinkRow,
    PaymentRow,
    PayoutRow,
    decode_batch,
)
from oncepay.logs import get_logger
from oncepay.service import Service, json_response

_log = get_logger("feed")


class FeedDoor:
    """The calls of a worker."""

    def __init__(
        self,
        database: Database,
        reader: Reader,
        internal_token: str,
        *,
        recording: Callable[[], bool],
        applied: Callable[[], None],
    ) -> None:
        """`recording`: whether events are kept. `applied` is called after a batch was applied."""
        self._database = database
        self._recording = recording
        self._applied = applied
        self._reader = reader
        self._expected = f"Bearer {internal_token}".encode() if internal_token else b""

    def register(self, service: Service) -> None:
        """Serve them. They are no part of the public API: the secret between services opens them, not an API key."""
        service.route("POST", "/v1/feed", self.post)
        service.route("GET", "/v1/feed/{shard}", self.position)
        service.route("POST", "/v1/feed/{shard}/rebuild", self.rebuild)

    def _authorize(self, request: web.Request) -> None:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self._expected and not hmac.compare_digest(given, self._expected):
            raise Unauthorized("the feed takes the secret between services")

    async def position(self, request: web.Request) -> web.Response:
        """GET /v1/feed/{shard}"""
        self._authorize(request)
        shard = path_id(request, "shard")
        async with self._database.connection("feed") as connection:
            return json_response(await apply.position(connection, shard))

    async def post(self, request: web.Request) -> web.Response:
        """POST /v1/feed"""
        self._authorize(request)
        try:
            batch = decode_batch(await request.read())
        except web.HTTPRequestEntityTooLarge:
            raise BodyTooLarge(f"a batch has at most {FEED_BYTES_MAX} bytes") from None
        except msgspec.DecodeError as error:
            raise MalformedBody(f"the body is no batch: {error}") from None
        began = time.perf_counter()
        async with self._database.connection("feed") as connection:
            answer = await apply.apply(connection, batch, recording=self._recording())
        if answer.applied and batch.rows:
            self._applied()
        self._note(batch, answer, time.perf_counter() - began)
        return json_response(answer)

    async def rebuild(self, request: web.Request) -> web.Response:
        """POST /v1/feed/{shard}/rebuild"""
        self._authorize(request)
        shard = path_id(request, "shard")
        async with self._database.connection("feed") as connection:
            position = await rebuild(connection, shard, request.content)
        metrics.REBUILDS.labels(shard).inc()
        if position.watermark is not None:
            self._reader.moved(shard, position.watermark)
            metrics.WATERMARK.labels(shard).set(position.watermark)
        return json_response(position)

    def _note(self, batch: FeedBatch, answer: FeedAnswer, seconds: float) -> None:
        metrics.BATCHES.labels(batch.shard, answer.reason or "applied").inc()
        if not answer.applied:
            _log.warning("batch refused", shard=batch.shard, reason=answer.reason, start=batch.from_lsn, at=answer.watermark)
            return
        self._reader.moved(batch.shard, batch.to_lsn)
        metrics.APPLY_SECONDS.observe(seconds)
        metrics.WATERMARK.labels(batch.shard).set(batch.to_lsn)
        for kind, rows in _kinds(batch):
            if rows:
                metrics.ROWS.labels(batch.shard, kind).inc(len(rows))
        newest_ms = max((rows[-1].committed_at_ms for _, rows in _kinds(batch) if rows), default=None)
        if newest_ms is not None:
            metrics.LAG_SECONDS.labels(batch.shard).set(max(0.0, time.time() - newest_ms / 1000))


def _kinds(batch: FeedBatch) -> tuple[tuple[str, Sequence[PaymentRow | EntryRow | LinkRow | PayoutRow]], ...]:
    return ("payment", batch.payments), ("entry", batch.entries), ("link", batch.links), ("payout", batch.payouts)
