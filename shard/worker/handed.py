"""The events that the account's reader hands to this shard: what webhooks missed is made good here.

Most say what the row has long had. Of a payment that is neither pending nor about a refund or a dispute nothing is read.
"""

from __future__ import annotations

import asyncio

import msgspec
from prometheus_client import Counter

from oncepay.driver import Driver
from oncepay.errors import OncepayError, Unavailable
from oncepay.incoming import DISPUTES, REFUNDS, TERMINAL, head_of, is_known, key_of, take_in
from oncepay.logs import get_logger
from oncepay.payment import Key
from oncepay.stripe_objects import EventObject
from shard.store.batch import EpochOver
from shard.store.store import Shards
from shard.worker.bulk import Bulk
from shard.worker.cache import PendingCache
from shard.worker.events import HandOver

CONCURRENCY = 8
EVENTS = Counter("oncepay_worker_events", "Events that were handed to this shard, by what came of them.", ["shard", "outcome"])

_log = get_logger("events")


class Handed:
    """Takes events in for one shard."""

    def __init__(self, shard: str, store: Shards, driver: Driver, cache: PendingCache, bulk: Bulk) -> None:
        self._shard = shard
        self._store = store
        self._driver = driver
        self._cache = cache
        self._bulk = bulk
        self._places = asyncio.Semaphore(CONCURRENCY)

    async def take(self, batch: HandOver) -> dict[str, int]:
        """Commit what the events say; how many had which outcome. Raises Unavailable: then all of them are to come again."""
        found = await asyncio.gather(*(self._one(event) for event in batch.events), return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
        outcomes: dict[str, int] = {}
        keys = []
        for key, outcome in (result for result in found if isinstance(result, tuple)):
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            EVENTS.labels(self._shard, outcome).inc()
            keys.append(key)
        self._bulk.handed(batch.from_s, batch.to_s, keys)
        return outcomes

    async def _one(self, event: EventObject) -> tuple[Key, str]:
        key = Key("")
        async with self._places:
            try:
                head = head_of(event)
                key = Key(await key_of(head, self._store, self._driver))
                outcome = await self._taken_in(key, event)
            except EpochOver as error:
                raise Unavailable(str(error)) from error
            except Unavailable:
                raise
            except OncepayError as error:
                _log.warning("event not taken in", event_id=event.id, type=event.type, error=str(error))
                return Key(""), error.slug
            except msgspec.DecodeError as error:  # the same again would be no better, and others wait behind it
                _log.error("event can't be read", key=key, event_id=event.id, type=event.type, error=str(error))
                return key, "unreadable"
        if outcome not in {"known", "not pending"}:
            _log.info("event taken in", key=key, event_id=event.id, type=event.type, outcome=outcome)
        return key, outcome

    async def _taken_in(self, key: Key, event: EventObject) -> str:
        aftercare = event.type in REFUNDS or event.type in DISPUTES
        if not aftercare and key not in self._cache:
            return "not pending"
        self._bulk.unsure(key)  # before its look can be due
        if not aftercare and event.type not in TERMINAL:
            return "hurried" if self._cache.hurry(key) else "young"
        payment = await self._store.get(key)
        if payment is None:
            return "foreign"
        if aftercare and is_known(payment, event):
            return "known"
        return await take_in(self._driver, payment, event, head_of(event))
