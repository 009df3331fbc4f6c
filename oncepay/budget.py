"""The account's one rate budget at Stripe, dealt out in shares to all processes that call it.

Stripe's limits hold for the account, by endpoint. What an endpoint allows is split over the processes by weight (routers carry
payments, workers polls, so payments come first), in one record in etcd that is only compared and put (`oncepay/shares.py`): the
shares never sum to more than the limit. While etcd is away they stay as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Mapping
from typing import Literal, get_args

import msgspec
from prometheus_client import Counter, Gauge

from oncepay.errors import EtcdUnavailable, OncepayError, StripeUnavailable
from oncepay.etcd import Etcd, EtcdOutcomeUnknown, EtcdRefused, Lease, Mirror
from oncepay.etcd.types import KeyValue
from oncepay.logs import get_logger
from oncepay.settings import StripeSettings
from oncepay.shares import PARK_S, Policy, Record, deal, slowed, without

Role = Literal["router", "worker", "aggregator"]

PREFIX = "budget/"
LEASE_TTL_S = 10
RECORD = "_shares"
"""The record with everybody's share; the other keys under the prefix are the living processes' names."""
SETTLE_S = 2.0
"""How long a share that may grow waits after the last change of who is there."""
HEADROOM = 0.9
"""The part of the limit that is dealt out at most; the rest takes what the way to Stripe moves from one second to the next."""
DEALT_MIN = 0.5
"""The part that is dealt out at least, however many the processes are."""
BURST_S = 0.05
"""What may be spent at once, in seconds of the share."""
SPREAD_S = 0.05
GIVE_BACK_S = 1.0
"""How long a process that ends waits for etcd to take its share back."""
GIVE_BACK_TRIES = 20
WAITING_MAX = 5_000
WAIT_MAX_S = 20.0
RETRY_S = 1.0

WEIGHTS: Mapping[str, Mapping[Role, float]] = {
    "create": {"router": 4, "worker": 1, "aggregator": 0},
    "confirm": {"router": 4, "worker": 1, "aggregator": 0},
    "retrieve": {"router": 1, "worker": 1, "aggregator": 0},
    "list": {"router": 1, "worker": 2, "aggregator": 0},
    "ledger": {"router": 0, "worker": 0, "aggregator": 1},
    "other": {"router": 2, "worker": 1, "aggregator": 0.5},
}
"""Endpoint classes, and who gets how much of each. The aggregator is registered only while it reconciles."""
LEDGER = ("balance_transactions", "payouts")
"""Lists with a limit of their own, which only a reconciliation reads."""

LOOK_S = 0.1
"""How long who waits may sleep at a time: a share that has grown is seen then, and a wait that was too long."""

_log = get_logger("budget")

SPENT = Counter("oncepay_stripe_budget_spent_total", "Requests sent to Stripe.", ["endpoint"])
SHARE = Gauge("oncepay_stripe_budget_share_per_s", "This process' share of the account's limit.", ["endpoint"])
WAITING = Gauge("oncepay_stripe_budget_waiting", "Requests that wait for their turn.", ["endpoint"])


def endpoint_of(method: str, path: str) -> str:
    """The endpoint class of a request; `path` without its query."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["v1", "payment_intents"]:
        if method == "post":
            return "create" if len(parts) == 2 else "confirm" if parts[-1] == "confirm" else "other"
        return "list" if len(parts) == 2 else "retrieve"
    if method == "get" and len(parts) == 2:
        return "ledger" if parts[1] in LEDGER else "list"
    return "other"


class BudgetShort(StripeUnavailable):
    """The rate budget has no room for this call; Stripe wasn't asked."""

    slug = "budget-short"


class Share:
    """Paces one endpoint: at most `rate_per_s` a second, first come first served."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.rate_per_s = 0.0
        self._spent = SPENT.labels(endpoint)
        self._waiting_now = WAITING.labels(endpoint)
        self._next_s = 0.0
        self._waiting: deque[tuple[asyncio.Future[None], float]] = deque()
        self._pump: asyncio.Task[None] | None = None

    def set_rate(self, rate_per_s: float) -> None:
        """From now on."""
        self.rate_per_s = rate_per_s
        SHARE.labels(self.endpoint).set(rate_per_s)

    async def take(self) -> None:
        """Return when one request may be sent. Raises BudgetShort when too many wait, or for too long."""
        if not self._waiting and self._spend():
            return
        if len(self._waiting) >= WAITING_MAX:
            raise BudgetShort(f"{WAITING_MAX} requests wait for the rate budget of {self.endpoint}")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, time.monotonic() + WAIT_MAX_S))
        self._waiting_now.set(len(self._waiting))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._release())
        await future

    def _spend(self) -> bool:
        now_s = time.monotonic()
        if self.rate_per_s <= 0:
            return False
        self._next_s = max(self._next_s, now_s - BURST_S)
        if self._next_s > now_s:
            return False
        self._next_s += 1 / self.rate_per_s
        self._spent.inc()
        return True

    async def _release(self) -> None:
        """Lets the waiting go, one after the other, as the rate allows; who has waited for too long goes without."""
        while self._waiting:
            future, until_s = self._waiting[0]
            if future.done():
                self._waiting.popleft()
            elif time.monotonic() >= until_s:
                self._waiting.popleft()
                future.set_exception(BudgetShort(f"the rate budget of {self.endpoint} had no room for {WAIT_MAX_S:.0f} s"))
            elif self._spend():
                self._waiting.popleft()
                future.set_result(None)
            else:
                pause_s = self._next_s - time.monotonic() if self.rate_per_s > 0 else LOOK_S
                await asyncio.sleep(min(LOOK_S, max(0.001, pause_s)))
        self._waiting_now.set(0)


def dealt(limit_per_s: float, members: int) -> float:
    """What is dealt out of a limit: a process may send BURST_S of its rate at once, and one request more in any second."""
    return max(DEALT_MIN * limit_per_s, min(HEADROOM * limit_per_s, (limit_per_s - members) / (1 + BURST_S)))


def share_of(limit_per_s: float, endpoint: str, role: Role, roles: Mapping[Role, int]) -> float:
    """A process' share, in requests a second, where `roles` counts the processes of each role (itself included)."""
    weights = WEIGHTS[endpoint]
    whole = sum(weights[each] * count for each, count in roles.items())
    return dealt(limit_per_s, sum(roles.values())) * weights[role] / whole if whole else 0.0


class Budget:
    """This process' shares. `start` registers it; `take` is called before each request, retries too."""

    def __init__(self, etcd: Etcd, settings: StripeSettings, *, name: str, role: Role) -> None:
        self._etcd = etcd
        self._settings = settings
        self._name = name
        self._role: Role = role
        self._shares = {endpoint: Share(endpoint) for endpoint in WEIGHTS}
        self._mirror = Mirror(etcd, PREFIX, on_change=self._changed)
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._members_changed_s = time.monotonic()
        self._policy = Policy(tuple(WEIGHTS), self._whole, self._fair)

    def start(self) -> None:
        """Begin; until the process has a share nothing may be sent."""
        self._mirror.start()
        self._tasks = [
            asyncio.create_task(self._stay_registered(), name="budget"),
            asyncio.create_task(self._deal_on(), name="budget-shares"),
        ]

    async def stop(self) -> None:
        """Send nothing more, and give the shares back."""
        for share in self._shares.values():
            share.set_rate(0.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._mirror.stop()
        with contextlib.suppress(TimeoutError):  # etcd is away: the share is parked
            async with asyncio.timeout(GIVE_BACK_S):
                await give_back(self._etcd, self._name)

    async def take(self, method: str, path: str) -> None:
        """Return when one request to that endpoint may be sent. Raises BudgetShort past its bounds."""
        await self._shares[endpoint_of(method, path)].take()

    def limit_per_s(self, endpoint: str) -> float:
        """The account's limit of an endpoint class."""
        return float(self._settings.rate_limits_per_s.get(endpoint, self._settings.default_rate_limit_per_s))

    def _whole(self, endpoint: str, members: int) -> float:
        return dealt(self.limit_per_s(endpoint), members)

    def _fair(self, endpoint: str, roles: Mapping[str, int]) -> float:
        known: dict[Role, int] = {role: roles[role] for role in get_args(Role) if role in roles}
        return share_of(self.limit_per_s(endpoint), endpoint, self._role, known)

    async def _stay_registered(self) -> None:
        """Hold a leased key, by which the others see that this process lives; when the lease was lost, take another one."""
        while True:
            try:
                lease = await self._registered()
            except (EtcdUnavailable, OncepayError) as error:
                _log.warning("not registered for the rate budget", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            try:
                await lease.lost.wait()
            except asyncio.CancelledError:
                async with asyncio.timeout(2):
                    await lease.revoke()
                raise

    async def _registered(self) -> Lease:
        lease = await self._etcd.grant_lease(LEASE_TTL_S)
        try:
            await self._etcd.put(PREFIX + self._name, self._role.encode(), lease=lease.id)
        except BaseException:  # a lease is kept alive for as long as the process lives
            await lease.revoke()
            raise
        return lease

    def _changed(self, key: str, value: KeyValue | None) -> None:
        if key != RECORD:
            self._members_changed_s = time.monotonic()
        self._wake.set()

    async def _deal_on(self) -> None:
        """Take part in the dealing: whenever something has changed, and again when a share may grow."""
        while True:
            try:
                may_grow_in_s = await self._deal()
            except (EtcdUnavailable, EtcdRefused, EtcdOutcomeUnknown) as error:
                _log.info("rate budget not dealt", error=str(error))
                may_grow_in_s = RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(may_grow_in_s):
                    await self._wake.wait()
            await asyncio.sleep(random.uniform(0, SPREAD_S))  # else all write at once, and all but one in vain
            self._wake.clear()

    async def _deal(self) -> float | None:
        """Write this process' share as it should be. Returns when to look again, in seconds; None: only on a change."""
        alive = {key for key in self._mirror.kvs if key != RECORD}
        if self._name not in alive:
            return None
        stored = await self._etcd.get(PREFIX + RECORD)
        record = msgspec.json.decode(stored.value, type=Record) if stored else Record()
        current = {endpoint: share.rate_per_s for endpoint, share in self._shares.items()}
        self._set(slowed(current, record, self._name))
        settled_in_s = self._members_changed_s + SETTLE_S - time.monotonic()
        # One that lives and has no place in the record yet (it was lost, or it has just come) may be calling Stripe already.
        grow = settled_in_s <= 0 and alive <= record.members.keys()
        made = deal(record, self._name, self._role, current, alive, self._policy, time.time(), grow=grow)
        mine = made.members[self._name].rates
        if made != record:
            self._set({endpoint: min(share.rate_per_s, mine[endpoint]) for endpoint, share in self._shares.items()})
            revision = stored.mod_revision if stored else 0
            if await self._etcd.compare_and_put(PREFIX + RECORD, msgspec.json.encode(made), revision) is None:
                return 0.0  # somebody else was first: again, on what is there now
        self._set(mine)
        if settled_in_s > 0:
            return settled_in_s
        return PARK_S / 10 if any(member.gone_s for member in made.members.values()) else None

    def _set(self, rates: Mapping[str, float]) -> None:
        for endpoint, rate in rates.items():
            if rate != self._shares[endpoint].rate_per_s:
                self._shares[endpoint].set_rate(rate)


async def give_back(etcd: Etcd, name: str) -> None:
    """Take `name` out of the record: its process has ended, or hasn't called Stripe yet. Best effort; else it is parked."""
    for _ in range(GIVE_BACK_TRIES):
        try:
            stored = await etcd.get(PREFIX + RECORD)
            record = msgspec.json.decode(stored.value, type=Record) if stored else Record()
            if stored is None or name not in record.members:
                return
            value = msgspec.json.encode(without(record, name))
            if await etcd.compare_and_put(PREFIX + RECORD, value, stored.mod_revision) is not None:
                return
        except (EtcdUnavailable, EtcdRefused, EtcdOutcomeUnknown) as error:
            _log.info("share of the rate budget not given back", error=str(error))
            return
