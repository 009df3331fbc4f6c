"""Payments, wherever they are: the right shard for each key, held through fences and failovers.

`Shards` serves the routers (all shards); a worker uses `Shards` too and drives only its own shard's payments, with its
epoch on that shard's batcher.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import asyncpg
from msgspec.structs import replace

from oncepay.deadlines import Deadlines
from oncepay.errors import EtcdUnavailable, NotFound, NotOwner, OutcomeUnknown, ShardUnavailable
from oncepay.etcd import Etcd
from oncepay.keys import slot as slot_of
from oncepay.ledger import BalanceLink, Entry
from oncepay.logs import get_logger
from oncepay.payment import Key, Payment
from oncepay.ports import StaleView
from oncepay.settings import Settings
from oncepay.shardmap import MapWatch, read_shards
from oncepay.transition import Event, IntentSeen, move
from shard.store.batch import Answer, Batcher, EntryView
from shard.store.leader import Leaders
from shard.store.rows import Put
from shard.store.sessions import watched

HOLD_S = 30.0
"""How long an operation is held through a fence or a failover before its caller hears 503."""
LAST_LOOK_S = 2.0
"""How long the row is asked for after that, where a change may have been committed."""
RETRY_PAUSE_S = 0.05
RETRY_PAUSE_MAX_S = 1.0
MOVED_PAUSE_MAX_S = 0.25
"""How long an operation on a range that is handed over waits for a new map before it looks whether its old owner has it again."""

T = TypeVar("T")
_log = get_logger("store")


class Shards:
    """The payments of all shards, for one process. `role` is the Postgres role, `actor` names the process in each row."""

    def __init__(self, etcd: Etcd, settings: Settings, *, role: str, password: str, actor: str) -> None:
        self._etcd = etcd
        self._settings = settings
        self._role = role
        self._password = password
        self._actor = actor
        self.leaders = Leaders(etcd)
        self.maps = MapWatch(etcd)
        self._batchers: dict[str, Batcher] = {}
        self._deadlines = Deadlines()
        self._events = map(f"{secrets.token_hex(8)}-{{:x}}".format, itertools.count(1))

    async def start(self, timeout_s: float = 60.0) -> None:
        """Begin to watch the map and the leaders. Raises EtcdUnavailable after `timeout_s`."""
        await self.leaders.start(timeout_s)
        await self.maps.start(timeout_s)

    async def stop(self) -> None:
        """Let what is in flight end, then close."""
        await asyncio.gather(*(batcher.stop() for batcher in self._batchers.values()))
        await self.maps.stop()
        await self.leaders.stop()

    def batcher(self, shard: str) -> Batcher:
        """The write path to `shard`, opened when it is first asked for."""
        found = self._batchers.get(shard)
        if found is None:
            found = self._batchers[shard] = Batcher(shard, self.leaders, self.maps, self.connect, self._actor)
            found.start()
        return found

    async def names(self) -> list[str]:
        """All shards that may still have something to tell, also those that own nothing (any more). Raises EtcdUnavailable."""
        return sorted({*self.maps.current.shards(), *await read_shards(self._etcd)})

    async def connect(self, host: str, port: int) -> asyncpg.Connection:
        """A session with a node, in this process' role."""
        session = await asyncpg.connect(
            host=host,
            port=port,
            user=self._role,
            password=self._password,
            database=self._settings.postgres.database,
            ssl=False,
            timeout=5,
            server_settings={
                "application_name": self._actor,
                "idle_in_transaction_session_timeout": "3000",
                # A commit waits for the quorum, and nothing cuts it off, whatever the database's defaults are.
                "synchronous_commit": "on",
                "statement_timeout": "0",
                "transaction_timeout": "0",
                "jit": "off",
                # Planning anew for each batch's arrays took more than half of a small batch's time.
                "plan_cache_mode": "force_generic_plan",
                # A plan is kept for long. One that was made while the shard was small must not read the whole table later.
                "enable_seqscan": "off",
                "enable_hashjoin": "off",
                "enable_mergejoin": "off",
            },
        )
        return watched(session)

    async def accept(self, payment: Payment, event: str = "accepted") -> tuple[Payment, bool]:
        """Commit a new row, or find the one that has the key already: `(the row, whether this call made it)`.

        The caller compares fingerprints. Raises ShardUnavailable or OutcomeUnknown after the hold, TooBusy at once.
        """
        event = f"{event} {next(self._events)}"
        put = Put(payment, 0, event)

        answer = await self._held(payment.key, lambda batcher: batcher.put(put))
        if answer.outcome == "done":
            return payment, True
        assert answer.payment is not None
        return answer.payment, answer.event == event  # a commit of ours whose outcome was unknown

    async def get(self, key: str, hold_s: float | None = None) -> Payment | None:
        """The row of `key`, behind the barrier."""
        return (await self._held(key, lambda batcher: batcher.get(key), hold_s)).payment

    async def get_with_entries(self, key: str) -> tuple[Payment, tuple[EntryView, ...]] | None:
        """The row of `key` and its ledger entries, oldest first, from one snapshot behind the barrier."""
        answer = await self._held(key, lambda batcher: batcher.get(key, entries=True))
        return (answer.payment, answer.entries) if answer.payment else None

    async def by_intent(self, intent: str) -> Payment | None:
        """The row that names a PaymentIntent, on whichever shard it is. Raises ShardUnavailable or OutcomeUnknown."""

        async def attempt() -> Payment | None:
            shards = self.maps.current.shards()
            found = await asyncio.gather(*(self.batcher(shard).by_intent(intent) for shard in shards))
            return next((payment for payment in found if payment is not None), None)

        return await self.hold(attempt)

    async def apply(self, payment: Payment, *events: Event, event: str) -> Payment:
        """Apply events to a row in one commit and return the row as it is then. `event` names the reason in the row.

        The row is compared by version. When it has changed meanwhile, facts that are terminal at Stripe are applied to
        the row as it is now; a view that is not terminal is stale then, and StaleView says so. Raises what `move` raises.
        """
        while True:
            put = self._put(payment, events, event)
            if put is None:
                return payment
            current, is_own = await self._compared(put)
            if is_own:
                return put.payment
            if any(_goes_stale(item) for item in events):
                raise StaleView(current)
            payment = current

    async def _compared(self, put: Put) -> tuple[Payment, bool]:
        """Commit a change that is compared by version: `(the row as it is then, whether that is this very change)`.

        A try whose outcome was unknown may have been committed; then the next one finds its version gone. The row tells:
        no other change is alike in everything, to the millisecond.
        """
        is_unknown = False

        async def attempt(batcher: Batcher) -> Answer:
            nonlocal is_unknown
            try:
                return await batcher.put(put)
            except OutcomeUnknown:
                is_unknown = True
                raise

        try:
            answer = await self._held(put.payment.key, attempt)
        except OutcomeUnknown:
            current = await self.get(put.payment.key, LAST_LOOK_S)
            if current is None:
                raise
        else:
            if answer.outcome == "done":
                return put.payment, True
            current = answer.payment
            if current is None:
                raise NotFound(f"there is no payment {put.payment.key}")
        return current, is_unknown and current == put.payment

    def _put(self, payment: Payment, events: tuple[Event, ...], event: str) -> Put | None:
        moved_payment = payment
        entries: tuple[Entry, ...] = ()
        links: tuple[BalanceLink, ...] = ()
        for item in events:
            moved = move(moved_payment, item)
            moved_payment, entries, links = moved.payment, entries + moved.entries, links + moved.links
        if moved_payment is payment:
            return None
        now_ms = max(time.time_ns() // 1_000_000, payment.updated_at_ms)
        after = replace(moved_payment, version=payment.version + 1, updated_at_ms=now_ms)
        return Put(after, payment.version, event, entries, links)

    def _held(self, key: Key | str, attempt: Callable[[Batcher], Awaitable[T]], hold_s: float | None = None) -> Awaitable[T]:
        """Run `attempt` on the shard that owns `key`, held as `hold` holds."""
        slot = slot_of(key)
        return self.hold(lambda: attempt(self.batcher(self.maps.current.range_of(slot).shard)), hold_s)

    async def hold(self, attempt: Callable[[], Awaitable[T]], hold_s: float | None = None) -> T:
        """Run `attempt`, and again after moves, failovers and unknown outcomes, for `hold_s` (HOLD_S); then raise what it raised.

        What is attempted again must be safe to repeat: a new row, a compared update (a second one finds its version
        gone), a replacement or a read.
        """
        hold_s = HOLD_S if hold_s is None else hold_s
        deadline_s = time.monotonic() + hold_s
        pause_s = RETRY_PAUSE_S
        while True:
            error: Exception
            version = self.maps.current.version if self.maps.known else 0
            try:
                return await self._deadlines.within(max(0.1, deadline_s - time.monotonic()), attempt())
            except (NotOwner, OutcomeUnknown, ShardUnavailable, EtcdUnavailable) as problem:
                error = problem
            except TimeoutError:
                error = ShardUnavailable(f"no answer from the payment's shard in {hold_s:.0f} s")
            if time.monotonic() + pause_s >= deadline_s:
                raise error
            if isinstance(error, NotOwner):  # a range that is handed over: the new map tells where it goes on
                await self.maps.newer(version, pause_s)
                pause_s = min(pause_s * 2, MOVED_PAUSE_MAX_S)
                continue
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, RETRY_PAUSE_MAX_S)


def _goes_stale(event: Event) -> bool:
    """Whether an event holds only for the version of the row that was looked at."""
    return isinstance(event, IntentSeen) and event.view.status not in {"succeeded", "canceled"}
