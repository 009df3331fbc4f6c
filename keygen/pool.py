"""The pool as a replica runs it: demand on one side, blocks on the other, and keys made ready in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from keygen.blocks import Blocks
from keygen.reserve import Reserve
from keygen.slots import SlotRange
from keygen.turns import TURNS
from oncepay.errors import NoKeys, OncepayError
from oncepay.keys import MacSecrets
from oncepay.logs import get_logger

AHEAD_S = 300.0
"""Keys for so long at least, at the recent rate, are persisted as this replica's own: what an outage of etcd is bridged with."""
AHEAD_LEAST = 1 << 16
AHEAD_MOST = 1 << 27
STEP_PART = 2
"""A watermark is raised when less than AHEAD_S is left, to that and one STEP_PARTth of it more: seldom, and all at once."""
LOW_S = 30.0
"""Below keys for so long, while etcd is away, the replica calls itself not ready."""
LOW_LEAST = 16_384
READY_S = 0.5
READY_LEAST = 1_000
READY_MOST = 40_000
READY_CHUNK = 500
TURN_S = 1800.0
"""A turn lasts so long at the recent rate, which is as long as from one checkpoint of a shard to the next: see `keygen.turns`."""
WAITING_A_TURN = TURNS // 2
"""So many turns' keys wait: those of the next turn are all there, of the one that has just ended none."""
WAITING_MOST = 1 << 21
"""Keys that wait for their turn at most: 50 MB. Beyond 146 keys a second turns are shorter."""
WAITING_OF_BLOCK = 8
"""And at most one in so many of a block: they are wasted when the replica ends, and each block is a write to etcd."""
TURNS_RATE_MOST = 3_000.0
"""Where so many keys a second are taken, turns would be over in minutes: then keys are given out as they are made."""
TURNS_PAUSE_S = 0.1
"""After each slice of keys that are made to wait: 5,000 keys a second, a hundredth of a core. They are in no hurry."""
FREE_BLOCKS = 2
GRANTS_A_ROUND = 64
TICK_S = 1.0
RATE_SPAN_S = 30.0
RATE_NONE_PER_S = 0.001
WAIT_S = 2.0
STALE_S = 5.0
WAITERS = 1_000
SEARCH_S = 5.0
SEARCH_STEP = 1 << 16
ASIDE_MOST = 1 << 18
"""Keys that searches for slots left over and nobody has taken since: some 25 MB."""

_log = get_logger("keygen")


class PoolState(msgspec.Struct, frozen=True):
    """What GET /v1/keys/pool tells. Counts of keys, but for `blocks_*` and `replicas`."""

    blocks_free: int
    blocks_held: int
    blocks_used_up: int
    keys_left: int
    replicas: list[str]
    replica: str
    available: int
    ready: int
    rate_per_s: float
    available_s: float | None
    etcd_away_s: float


class Pool:
    """Issues keys; `run` keeps it supplied."""

    def __init__(self, blocks: Blocks, *, ahead_s: float = AHEAD_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.blocks = blocks
        self._clock = clock
        self.issued = 0
        self.rate_per_s = 0.0
        self._ahead_s = ahead_s
        self._reserve = Reserve()
        self._secrets: MacSecrets | None = None
        self._wake = asyncio.Event()
        self._supplied = asyncio.Event()
        self._waiting = 0
        self._wanted = 0
        self._searching = asyncio.Lock()
        self._low = AHEAD_LEAST
        self._failing_since: float | None = None
        self._counted_at = clock()
        self._counted = 0

    # Demand

    @property
    def available(self) -> int:
        """How many keys can be issued without etcd."""
        return self._reserve.available if self._secrets is not None else 0

    @property
    def available_s(self) -> float:
        """For how many seconds they last at the recent rate; infinity without demand."""
        return self.available / self.rate_per_s if self.rate_per_s > RATE_NONE_PER_S else float("inf")

    @property
    def ready(self) -> int:
        """How many keys are made."""
        return self._reserve.ready + self._reserve.aside + self._reserve.waiting

    def take(self, count: int) -> list[str] | None:
        """`count` keys at once, or None when they aren't there: then `wait` for them."""
        if self._secrets is None or self._reserve.available < count:
            return None
        keys = self._reserve.take(count, self._secrets)
        self._gave(count)
        return keys

    def _gave(self, count: int) -> None:
        self.issued += count
        if self._reserve.available < self._low or self._reserve.ready < READY_LEAST // 2:
            self._wake.set()

    async def wait(self, count: int) -> list[str]:
        """`count` keys, after up to WAIT_S; then NoKeys."""
        self._begin_waiting()
        try:
            async with asyncio.timeout(WAIT_S):
                while (keys := self.take(count)) is None:
                    await self._supply(count)
                return keys
        except TimeoutError:
            raise NoKeys(f"{self.available} keys are left, {count} were asked for") from None
        finally:
            self._waiting -= 1

    async def take_in(self, slots: SlotRange, count: int) -> list[str]:
        """`count` keys of `slots`, from what is put aside, else made in slices until enough fit; those that don't fit are
        put aside for whoever asks next. NoKeys when that takes longer than SEARCH_S, or would put more than ASIDE_MOST
        aside; the range has been checked.
        """
        self._begin_waiting()
        found: list[str] = []
        try:
            async with asyncio.timeout(SEARCH_S), self._searching:
                found += self._reserve.take_aside(*slots, count)
                while (missing := count - len(found)) > 0:
                    if self._reserve.aside > ASIDE_MOST:
                        raise NoKeys(f"{self._reserve.aside} keys of other slots wait to be taken first")
                    if self._secrets is None or self._reserve.left == 0:
                        await self._supply(self._reserve.available + SEARCH_STEP)
                        continue
                    found += self._reserve.search(*slots, missing, READY_CHUNK, self._secrets)
                    await asyncio.sleep(0)
                keys, found = found, []
                self._gave(count)
                return keys
        except TimeoutError:
            raise NoKeys(f"{len(found)} keys of these slots were found in time, {count} were asked for") from None
        finally:
            self._waiting -= 1
            self._reserve.put_aside(found)

    def _begin_waiting(self) -> None:
        if self._waiting >= WAITERS:
            raise NoKeys("too many are waiting for keys already")
        self._waiting += 1

    async def _supply(self, available: int) -> None:
        """Ask for so many keys to be available, and wait for the next that come."""
        self._wanted = max(self._wanted, available)
        self._supplied.clear()
        self._wake.set()
        await self._supplied.wait()

    # Supply

    async def run(self) -> None:
        """Keep the reserve, the pool in etcd and the ready keys topped up, until cancelled."""
        self.blocks.mirror.start()
        next_round_at = 0.0
        try:
            while True:
                if time.monotonic() >= next_round_at or self.available < self._low or self._wanted:
                    await self._round()
                    next_round_at = time.monotonic() + TICK_S
                if self._make_ready():
                    await asyncio.sleep(0)
                    continue
                self._wake.clear()
                try:
                    async with asyncio.timeout(TURNS_PAUSE_S if self._make_wait() else TICK_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            await self.blocks.mirror.stop()
            await self.blocks.leave()

    async def _round(self) -> None:
        """One look at everything that needs etcd; what fails is tried again in the next round."""
        self._measure()
        try:
            await self.blocks.mirror.wait_synced(TICK_S)
            await self.blocks.register()
            await self.blocks.ensure_secrets()
            self._use(self.blocks.secrets())
            await self._refill()
            if len(self.blocks.free()) < FREE_BLOCKS:
                await self.blocks.add_free_block()
            await self.blocks.tidy()
        except OncepayError as error:
            if self._failing_since is None:
                self._failing_since = self._clock()
                _log.warning("pool can't be kept up", reason=str(error), available=self.available)
        else:
            if self._failing_since is not None:
                _log.info("pool is kept up again", after_s=round(self._clock() - self._failing_since, 1))
                self._failing_since = None

    def _use(self, secrets: MacSecrets | None) -> None:
        """Make keys with the current one of these from now on."""
        if secrets is not None:
            if self._secrets is not None and secrets.current != self._secrets.current:
                self._reserve.give_up_waiting()
            self._secrets = secrets

    async def _refill(self) -> None:
        """When the reserve has sunk below `_ahead_s` seconds of demand, and what waits for its turn, raise watermarks to that and
        a step more."""
        self._low = min(max(int(self.rate_per_s * self._ahead_s), AHEAD_LEAST) + self._waiting_aim(), AHEAD_MOST)
        depth = self._low + self._low // STEP_PART
        least = max(self._low, self._wanted)
        for _ in range(GRANTS_A_ROUND):
            if self._reserve.available >= least:
                break
            grant = await self.blocks.grant(max(depth, self._wanted) - self._reserve.available)
            if grant is not None:
                self._reserve.add(grant.seed, grant.first, grant.end)
                self._supplied.set()
        self._wanted = 0
        self._supplied.set()

    def _make_ready(self) -> bool:
        """Make a slice of keys, so short that no request is held up; whether there are more to make."""
        if self._secrets is None:
            return False
        aim = min(max(int(self.rate_per_s * READY_S), READY_LEAST), READY_MOST, self._reserve.available)
        self._reserve.make_ready(min(aim - self._reserve.ready, READY_CHUNK), self._secrets)
        return self._reserve.ready < aim

    def _waiting_aim(self) -> int:
        """How many keys are to wait for their turn."""
        if self.rate_per_s > TURNS_RATE_MOST:
            return 0
        return min(int(self.rate_per_s * TURN_S * WAITING_A_TURN), WAITING_MOST, self.blocks.block_keys // WAITING_OF_BLOCK)

    def _make_wait(self) -> bool:
        """Make a slice of keys that wait for their turn; whether there are more to make."""
        missing = self._waiting_aim() - self._reserve.waiting
        if missing < READY_CHUNK or self._reserve.left <= AHEAD_LEAST // 2 or self._secrets is None:
            return False
        self._reserve.make_wait(READY_CHUNK, self._secrets)
        return missing >= 2 * READY_CHUNK

    def _measure(self) -> None:
        now = self._clock()
        span_s = now - self._counted_at
        if span_s < TICK_S / 2:
            return
        recent = (self.issued - self._counted) / span_s
        weight = min(span_s / RATE_SPAN_S, 1.0)
        self.rate_per_s = max(self.rate_per_s + (recent - self.rate_per_s) * weight, 0.0)
        self._counted_at, self._counted = now, self.issued

    # Looking at it

    async def check(self) -> None:
        """NoKeys when the replica should get no more requests: nothing to issue, or not for long while etcd is away."""
        available = self.available
        if available == 0:
            raise NoKeys
        if self.etcd_away_s > 0 and available < max(self.rate_per_s * LOW_S, LOW_LEAST):
            raise NoKeys(f"etcd is away and only {available} keys are left")

    @property
    def etcd_away_s(self) -> float:
        """Seconds for which etcd has not been heard of or has refused what the pool needs; 0 while all is well."""
        failing_s = self._clock() - self._failing_since if self._failing_since is not None else 0.0
        stale_s = self.blocks.mirror.stale_s
        return max(failing_s, stale_s if STALE_S < stale_s < float("inf") else 0.0)

    def state(self) -> PoolState:
        """The pool as this replica sees it."""
        records = [block.record for block in self.blocks.all()]
        owners = self.blocks.owners()
        opened = [record for record in records if not record.used_up]
        held = sum(record.owner in owners for record in opened)
        return PoolState(
            blocks_free=len(opened) - held,
            blocks_held=held,
            blocks_used_up=len(records) - len(opened),
            keys_left=sum(record.size - record.watermark for record in opened),
            replicas=sorted(owners),
            replica=self.blocks.owner,
            available=self.available,
            ready=self.ready,
            rate_per_s=round(self.rate_per_s, 3),
            available_s=round(self.available_s, 1) if self.rate_per_s > RATE_NONE_PER_S else None,
            etcd_away_s=round(self.etcd_away_s, 1),
        )
