"""The account's one rate budget at Stripe, dealt out in shares to all processes that call it.

Stripe's limits hold for the account, by endpoint. Each process registers under a lease in etcd; what an endpoint allows is
split over the living by weight (routers carry payments, workers polls). A share shrinks at once and grows only after
SETTLE_S, so that the sum stays within the limit while processes come and go; a newcomer begins with nothing. While etcd
is away the shares stay as they are.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from typing import Literal

import msgspec
from prometheus_client import Counter, Gauge

from oncepay.errors import EtcdUnavailable, OncepayError, StripeUnavailable
from oncepay.etcd import Etcd, Mirror
from oncepay.etcd.types import KeyValue
from oncepay.logs import get_logger
from oncepay.settings import StripeSettings

Role = Literal["router", "worker", "aggregator"]

PREFIX = "budget/"
LEASE_TTL_S = 10
SETTLE_S = 2.0
"""How long a share that may grow waits for the others to have shrunk theirs."""
HEADROOM = 0.9
"""The part of the limit that is dealt out; the rest takes what a window's edge adds."""
BURST_S = 0.05
"""What may be spent at once, in seconds of the share."""
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
        self._waiting: deque[asyncio.Future[None]] = deque()
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
        self._waiting.append(future)
        self._waiting_now.set(len(self._waiting))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._release())
        try:
            await asyncio.wait_for(future, WAIT_MAX_S)
        except TimeoutError:
            raise BudgetShort(f"the rate budget of {self.endpoint} had no room for {WAIT_MAX_S:.0f} s") from None

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
        """Lets the waiting go, one after the other, as the rate allows."""
        while self._waiting:
            future = self._waiting[0]
            if future.done():
                self._waiting.popleft()
            elif self._spend():
                self._waiting.popleft()
                future.set_result(None)
            else:
                await asyncio.sleep(min(0.1, max(0.001, self._next_s - time.monotonic())))
        self._waiting_now.set(0)


class _Member(msgspec.Struct):
    role: Role


def share_of(limit_per_s: float, endpoint: str, role: Role, roles: Mapping[Role, int]) -> float:
    """A process' share, in requests a second, where `roles` counts the living processes of each role (itself included)."""
    weights = WEIGHTS[endpoint]
    whole = sum(weights[each] * count for each, count in roles.items())
    return HEADROOM * limit_per_s * weights[role] / whole if whole else 0.0


class Budget:
    """This process' shares. `start` registers it; `take` is called before each request, retries too."""

    def __init__(self, etcd: Etcd, settings: StripeSettings, *, name: str, role: Role) -> None:
        self._etcd = etcd
        self._settings = settings
        self._name = name
        self._role: Role = role
        self._shares = {endpoint: Share(endpoint) for endpoint in WEIGHTS}
        self._mirror = Mirror(etcd, PREFIX, on_change=self._changed)
        self._task: asyncio.Task[None] | None = None
        self._grow: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin; until the process is registered nothing may be sent."""
        self._mirror.start()
        self._task = asyncio.create_task(self._stay_registered(), name="budget")

    async def stop(self) -> None:
        """Give the shares back."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._grow is not None:
            self._grow.cancel()
        await self._mirror.stop()

    async def take(self, method: str, path: str) -> None:
        """Return when one request to that endpoint may be sent. Raises BudgetShort past its bounds."""
        await self._shares[endpoint_of(method, path)].take()

    def limit_per_s(self, endpoint: str) -> float:
        """The account's limit of an endpoint class."""
        return float(self._settings.rate_limits_per_s.get(endpoint, self._settings.default_rate_limit_per_s))

    async def _stay_registered(self) -> None:
        """Hold a leased record; when the lease was lost, take another one."""
        record = msgspec.json.encode(_Member(self._role))
        while True:
            try:
                lease = await self._etcd.grant_lease(LEASE_TTL_S)
                await self._etcd.put(PREFIX + self._name, record, lease=lease.id)
            except (EtcdUnavailable, OncepayError) as error:
                _log.warning("not registered for the rate budget", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            try:
                await lease.lost.wait()
            except asyncio.CancelledError:
                await asyncio.wait_for(asyncio.shield(lease.revoke()), 2)
                raise

    def _changed(self, key: str, value: KeyValue | None) -> None:
        wanted = self._wanted()
        for endpoint, rate in wanted.items():
            share = self._shares[endpoint]
            if rate < share.rate_per_s:
                share.set_rate(rate)
        if self._grow is not None:
            self._grow.cancel()
        self._grow = asyncio.get_running_loop().call_later(SETTLE_S, self._grown)

    def _grown(self) -> None:
        for endpoint, rate in self._wanted().items():
            self._shares[endpoint].set_rate(rate)

    def _wanted(self) -> dict[str, float]:
        """The shares by who is registered now; a process that isn't keeps what it has (etcd may be away)."""
        roles: dict[Role, int] = {}
        for value in self._mirror.kvs.values():
            role = msgspec.json.decode(value.value, type=_Member).role
            roles[role] = roles.get(role, 0) + 1
        if self._name not in self._mirror.kvs:
            return {endpoint: share.rate_per_s for endpoint, share in self._shares.items()}
        return {each: share_of(self.limit_per_s(each), each, self._role, roles) for each in WEIGHTS}
