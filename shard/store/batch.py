"""Group commit: what arrives for a shard while a batch is on its way is the next batch, one quorum round for all.

The invariant: an operation is answered only when its batch's commit was acknowledged *and* the evidence was seen that a
member's physical standby has flushed past it. Anything else (a cut connection, no evidence in time) is OutcomeUnknown for
every operation of the batch, and the caller reads back. A commit in flight is never canceled or timed out; on a change of
leader its connection is dropped without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

import asyncpg
import msgspec
from prometheus_client import Counter, Histogram

from oncepay.errors import InvalidField, NotOwner, OncepayError, OutcomeUnknown, ShardUnavailable, TooBusy
from oncepay.keys import slot as slot_of
from oncepay.logs import get_logger
from oncepay.payment import Payment
from oncepay.shardmap import MapWatch
from shard.store import migrate
from shard.store.bounds import Bounds
from shard.store.evidence import prove
from shard.store.leader import Leaders, Node
from shard.store.rows import Put, change_arrays, entry_arrays, new_arrays, payment_of

WRITERS = 2
CROWD = 128
"""Operations that wait, from which on a batch is sent whatever its distance to the one before, and beside one that is in flight.
Below, one larger batch costs less than two."""
PATIENCE_S = 0.05
"""How long a batch may be in flight before what waits behind it goes another way."""
PACE_S = 0.15
PRICE = 2.0
"""A batch costs as much as some thirty of its operations, so that under load fewer and larger ones make every payment cheaper.
Where batches have BUSY_ROWS, the next one follows no sooner than in sqrt(PRICE / new payments a second) seconds, and in PACE_S at
most: the distance at which what batches cost and what new payments wait for them are least together. The more new payments come,
the less each of them waits. A lone payment waits for nobody. See docs/decisions/0125-distance-by-rate.md."""
BUSY_ROWS = 3
LATELY_S = 0.5
"""Over how long batches' size and rate are averaged."""
ROWS_MAX = 400
"""Operations in one batch."""
WRITES_MAX = 1_000
"""Single writes that may wait for one shard; more are refused with TooBusy."""
WAITING_MAX = 20_000
"""Operations that may wait for one shard; more are refused with TooBusy."""
HURRY = "hurry"
"""Ends the message of a read's barrier whose reader waits for the aggregator to be so far: the feed then doesn't wait until a row
changes."""
STOP_S = 5.0
"""How long a store that stops waits for its batches in flight."""
CONNECT_S = 5.0
RETRY_S = 0.25

_LOST = (OSError, TimeoutError, OutcomeUnknown, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What a session raises when it is gone, or its commit has no evidence. asyncpg calls it internal between two calls."""

_log = get_logger("store")

BATCHES = Counter("oncepay_store_batches_total", "Batches sent to a shard.", ["shard", "outcome"])
ROWS = Histogram("oncepay_store_batch_rows", "Operations in a batch.", ["shard"], buckets=(1, 2, 5, 10, 20, 50, 100, 200, 400))
SECONDS = Histogram("oncepay_store_batch_seconds", "A batch's commit with its evidence.", ["shard"])

_CALL = f"select * from oncepay.commit_batch({', '.join(f'${n}' for n in range(1, 47))})"  # noqa: S608 (placeholders only)


class EpochOver(OncepayError):
    """Another worker has taken the shard over."""

    slug = "epoch-over"


class SchemaMismatch(OncepayError):
    """The shard's schema is not the one that this version expects; run `oncepay shards migrate`."""

    slug = "schema-mismatch"


class RowUnreadable(OncepayError):
    """A row holds what this version can't read."""

    slug = "row-unreadable"


class EntryView(msgspec.Struct, frozen=True):
    """An entry as it stands in the table: parallel arrays of accounts, amounts (minor units, debits positive), sellers."""

    entry_id: str
    kind: str
    currency: str
    source: str
    accounts: list[str]
    amounts: list[int]
    sellers: list[str]


_entries = msgspec.json.Decoder(tuple[EntryView, ...]).decode


class Answer(msgspec.Struct, frozen=True):
    """What became of a put ('done', 'exists', 'conflict', 'missing') and the row as it is, where that is another."""

    outcome: str
    payment: Payment | None
    entries: tuple[EntryView, ...] = ()
    event: str = ""


class _Unsendable(Exception):
    """A row can't be put into arrays. Nothing was sent."""


class Connect(Protocol):
    """Opens a session to a node."""

    async def __call__(self, host: str, port: int) -> asyncpg.Connection: ...


class _Operation:
    """One waiting put, read or barrier."""

    __slots__ = ("by_intent", "entries", "future", "key", "put", "slot")

    def __init__(
        self,
        future: asyncio.Future[Answer],
        put: Put | None = None,
        key: str = "",
        by_intent: bool = False,
        entries: bool = False,
    ) -> None:
        self.future = future
        self.entries = entries
        self.put = put
        self.key = put.payment.key if put else key
        self.by_intent = by_intent
        self.slot = -1 if by_intent or not self.key else slot_of(self.key)

    @property
    def kind(self) -> str:
        """As `commit_batch` names it in its answers."""
        if self.put is not None:
            return "put" if self.put.expect else "new"
        return "intent" if self.by_intent else "get"


class Batcher:
    """The write path to one shard. `epoch` is set for a worker: each of its transactions then checks it."""

    def __init__(self, shard: str, leaders: Leaders, maps: MapWatch, connect: Connect, actor: str) -> None:
        self.shard = shard
        self.epoch: int | None = None
        self._leaders = leaders
        self._maps = maps
        self._connect = connect
        self._actor = actor
        self._nonces = itertools.count(1)
        self._waiting: deque[_Operation] = deque()
        self._arrived = asyncio.Event()
        self._connections: set[asyncpg.Connection] = set()
        self._busy = 0
        self._stopping = False
        self._sent_s = 0.0
        self._rows_lately = 0.0
        self._news_lately = 0.0
        self._sooner = asyncio.Event()
        """A crowd has come, or the batch in flight has ended: the next one may go sooner than was thought."""
        self._turn = asyncio.Lock()
        """Of the writer that waits for the next batch."""
        self._done = BATCHES.labels(shard, "done")
        self._rows = ROWS.labels(shard)
        self._seconds = SECONDS.labels(shard)
        self._given_up = 0
        self._barrier_session: asyncpg.Connection | None = None
        self._barrier_lock = asyncio.Lock()
        self.barrier_lost = asyncio.Event()
        """Set when the barrier's session has ended: a node that shuts down ends its sessions, but not its walsenders."""
        self._writes: set[asyncio.Task[asyncpg.Record]] = set()
        self._reader_session: asyncpg.Connection | None = None
        self._reader_lock = asyncio.Lock()
        self._bounds = Bounds(maps, self._read_bounds)
        self._tasks: list[asyncio.Task[None]] = []
        leaders.on_change(self._leader_changed)

    def start(self, writers: int = WRITERS) -> None:
        """Begin to write."""
        self._tasks = [asyncio.create_task(self._write(), name=f"writer-{self.shard}-{n}") for n in range(writers)]

    async def stop(self) -> None:
        """Let the batches in flight end (bounded), then close."""
        deadline_s = time.monotonic() + STOP_S
        while (self._waiting or self._busy) and time.monotonic() < deadline_s:  # noqa: ASYNC110 (bounded, at the very end)
            await asyncio.sleep(0.02)
        self._stopping = True
        for connection in list(self._connections):
            connection.terminate()  # first: a task that is canceled in a commit would have Postgres cancel it
        while self._busy and time.monotonic() < deadline_s + 1:  # noqa: ASYNC110 (its connection is gone: it ends at once)
            await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._bounds.stop()
        for connection in list(self._connections):
            connection.terminate()  # one that was opened meanwhile
        self._fail(list(self._waiting), ShardUnavailable(f"{self.shard}: this process ends"))

    def put(self, put: Put) -> Awaitable[Answer]:
        """Commit a row. Raises NotOwner, OutcomeUnknown, ShardUnavailable or TooBusy."""
        return self._submit(_Operation(asyncio.get_running_loop().create_future(), put=put))

    def get(self, key: str, *, entries: bool = False) -> Awaitable[Answer]:
        """The row of `key` behind the barrier: what is answered here can't be erased by a failover."""
        return self._submit(_Operation(asyncio.get_running_loop().create_future(), key=key, entries=entries))

    async def by_intent(self, intent: str) -> Payment | None:
        """The row that names the PaymentIntent, if it is on this shard, behind the barrier."""
        return (await self._submit(_Operation(asyncio.get_running_loop().create_future(), key=intent, by_intent=True))).payment

    async def _submit(self, operation: _Operation) -> Answer:
        if len(self._waiting) >= WAITING_MAX and self._given_up:
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.future.done())
            self._given_up = 0
        if len(self._waiting) >= WAITING_MAX:
            raise TooBusy(f"{WAITING_MAX} operations wait for shard {self.shard}")
        self._waiting.append(operation)
        self._arrived.set()
        if len(self._waiting) >= CROWD:
            self._sooner.set()
        try:
            return await operation.future
        except asyncio.CancelledError:
            self._given_up += 1
            raise

    def _leader_changed(self, shard: str) -> None:
        """A deposed leader keeps its sockets open: drop them, without a cancel request."""
        if shard == self.shard:
            for connection in list(self._connections):
                connection.terminate()

    async def _write(self) -> None:
        """One writer: takes what has come in, sends it, answers. It never ends but by being canceled while idle."""
        connection: asyncpg.Connection | None = None
        while not self._stopping:
            async with self._turn:  # or each of them would have a timer for the same batch
                await self._wanted()
                is_open = connection is not None and not connection.is_closed()
                batch = self._take() if is_open else []
                if batch:
                    self._busy += 1
                    self._count(batch)
            if not is_open:
                connection = await self._session()
            elif batch:
                assert connection is not None
                try:
                    await self._send(connection, batch)
                finally:
                    self._busy -= 1
                    self._sooner.set()

    async def _wanted(self) -> None:
        """Return when a batch is to be sent: something waits, and no other batch is in flight, or a crowd waits behind it."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        while 0 < len(self._waiting) < CROWD:
            patience_s = self._sent_s + self._distance_s() - time.monotonic()
            if patience_s <= 0:
                return
            self._sooner.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self._sooner.wait()

    def _distance_s(self) -> float:
        """How soon the next batch may follow the last one: 0 at once, where there is no load."""
        pace_s = 0.0
        if self._rows_lately >= BUSY_ROWS:
            pace_s = min(PACE_S, math.sqrt(PRICE / max(self._news_lately, 1.0)))
        return max(pace_s, PATIENCE_S if self._busy else 0.0)

    def _count(self, batch: Sequence[_Operation]) -> None:
        """A batch is sent: its operations, and new payments a second, go into the averages by the time since the one before."""
        now_s = time.monotonic()
        passed_s = max(now_s - self._sent_s, 0.001)
        share = 1.0 - math.exp(-passed_s / LATELY_S)
        news = sum(1 for operation in batch if operation.put is not None and not operation.put.expect)
        self._rows_lately += share * (len(batch) - self._rows_lately)
        self._news_lately += share * (news / passed_s - self._news_lately)
        self._sent_s = now_s

    async def _session(self) -> asyncpg.Connection | None:
        """A session on the leader, or None after a pause. Operations wait meanwhile; their callers have bounds."""
        node = self._leaders.current(self.shard)
        try:
            node = node or await self._leaders.wait(self.shard, RETRY_S)
            return await self._opened(node)
        except Exception as error:  # whatever it is: a writer that ends would leave its operations waiting for ever
            _log.info("no session", shard=self.shard, error=repr(error))
            await asyncio.sleep(RETRY_S)
            return None

    async def _opened(self, node: Node) -> asyncpg.Connection:
        async with asyncio.timeout(CONNECT_S):  # wait_for can lose a cancel that comes when it is done
            connection = await self._connect(node.host, node.port)
            if (found := await migrate.version(connection)) < migrate.LATEST:
                connection.terminate()
                text = f"its schema is at migration {found}, this code needs {migrate.LATEST}: `oncepay shards migrate`"
                raise ShardUnavailable(f"shard {self.shard}: {text}")
        if self._leaders.current(self.shard) not in (None, node):  # the change was told while this one wasn't known yet
            connection.terminate()
            raise ShardUnavailable(f"{node.name} no longer leads {self.shard}")
        self._connections.add(connection)
        connection.add_termination_listener(self._connections.discard)
        return connection

    def _take(self) -> list[_Operation]:
        """The next batch: at most ROWS_MAX, one put a key (the others keep their place), nobody who gave up waiting."""
        batch: list[_Operation] = []
        later: list[_Operation] = []
        keys: set[str] = set()
        while self._waiting and len(batch) < ROWS_MAX:
            operation = self._waiting.popleft()
            if operation.future.done():
                continue
            if operation.put is not None:
                if operation.key in keys:
                    later.append(operation)
                    continue
                keys.add(operation.key)
            batch.append(operation)
        self._waiting.extendleft(reversed(later))
        return batch

    async def _send(self, connection: asyncpg.Connection, batch: list[_Operation]) -> None:
        """Send a batch as one transaction; when a row is poisonous, halve until it stands alone and fails alone."""
        started_s = time.monotonic()
        try:
            rows = await self._commit(connection, batch)
            await self._prove(connection)
        except asyncpg.PostgresError as error:
            if isinstance(error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError) or connection.is_closed():
                self._unknown(connection, batch, error)
            elif error.sqlstate == "OP001":
                self._fail(batch, EpochOver(str(error)))
            elif isinstance(error, asyncpg.ReadOnlySQLTransactionError):
                connection.terminate()
                self._fail(batch, ShardUnavailable(f"{self.shard}: the node is not the leader"))
            elif len(batch) == 1 or not _is_data(error):
                _log.warning("batch refused", shard=self.shard, rows=len(batch), error=repr(error))
                self._fail(batch, _refusal(error))
            else:
                await self._send_halves(connection, batch)
            BATCHES.labels(self.shard, "error").inc()
            return
        except _Unsendable as error:
            if len(batch) == 1:
                self._fail(batch, InvalidField(f"the row can't be stored: {error}"))
            else:
                await self._send_halves(connection, batch)
            return
        except _LOST as error:
            self._unknown(connection, batch, error)
            return
        except Exception as error:  # ours: the batch is not answered as committed, and the writer lives on
            _log.exception("batch failed", shard=self.shard, rows=len(batch))
            self._unknown(connection, batch, error)
            return
        self._seconds.observe(time.monotonic() - started_s)
        self._done.inc()
        self._rows.observe(len(batch))
        self._answer(batch, rows)

    async def _send_halves(self, connection: asyncpg.Connection, batch: list[_Operation]) -> None:
        middle = len(batch) // 2
        await self._send(connection, batch[:middle])
        await self._send(connection, batch[middle:])

    async def _commit(self, connection: asyncpg.Connection, batch: list[_Operation]) -> Sequence[Mapping[str, Any]]:
        batch.sort(key=lambda o: (o.put is None, o.by_intent, o.slot, o.key))
        puts = [o.put for o in batch if o.put is not None]
        new = [put for put in puts if not put.expect]
        changes = [put for put in puts if put.expect]
        gets = [o for o in batch if o.put is None and o.slot >= 0]
        ranges = sorted({self.first_of(o.slot) for o in batch if o.put is not None})
        try:
            arrays = [*new_arrays(new), *change_arrays(changes), *entry_arrays(changes)]
        except (ValueError, TypeError, OverflowError, msgspec.MsgspecError) as error:
            raise _Unsendable(repr(error)) from error
        rows: Sequence[Mapping[str, Any]] = await connection.fetch(
            _CALL, ranges, self.epoch, self._actor, f"{self._actor}:{next(self._nonces)}", *arrays,
            [o.slot for o in gets], [o.key for o in gets], [o.entries for o in gets], [o.key for o in batch if o.by_intent],
        )  # fmt: skip
        return rows

    async def _prove(self, connection: asyncpg.Connection) -> None:
        """Return when a member's physical standby has flushed past the commit just made in this session."""
        await prove(connection, self.shard, self._leaders.member_slots(self.shard))

    def _answer(self, batch: list[_Operation], rows: Sequence[Mapping[str, Any]]) -> None:
        asked: dict[str, list[_Operation]] = {"new": [], "put": [], "get": [], "intent": []}
        if rows:
            for operation in batch:
                if operation.slot >= 0 or operation.by_intent:
                    asked[operation.kind].append(operation)
        for row in rows:
            target = asked[row["kind"]][row["ordinal"] - 1]
            if target.future.done():
                continue
            if row["outcome"] == "moved":
                target.future.set_exception(self.not_owner(target.key))
                continue
            try:
                payment = payment_of(row) if row["key"] is not None else None
                found = _entries(row["entries"]) if row["entries"] else ()
            except ValueError as error:  # written by a later version, or by hand: its neighbours are answered all the same
                _log.error("row unreadable", shard=self.shard, key=row["key"], error=str(error))
                target.future.set_exception(RowUnreadable(f"{row['key']}: {error}"))
            else:
                target.future.set_result(Answer(row["outcome"], payment, found, row["event"] or ""))
        for operation in batch:
            if not operation.future.done():  # an intent that no row names
                operation.future.set_result(Answer("missing" if operation.put is None else "done", None))

    def _unknown(self, connection: asyncpg.Connection, batch: list[_Operation], error: BaseException) -> None:
        connection.terminate()
        BATCHES.labels(self.shard, "unknown").inc()
        _log.warning("outcome unknown", shard=self.shard, rows=len(batch), error=repr(error))
        self._fail(batch, OutcomeUnknown(f"shard {self.shard}: {error!r}"))

    @staticmethod
    def _fail(batch: list[_Operation], error: BaseException) -> None:
        for operation in batch:
            if not operation.future.done():
                operation.future.set_exception(error)

    def first_of(self, slot: int) -> int:
        """The first slot of the range that holds `slot`, as the shard cuts them: its writes lock the range by it."""
        return self._bounds.first_of(slot)

    def not_owner(self, what: str) -> NotOwner:
        """The error for a write or a read that the shard answered with `moved`. How the shard cuts its ranges is looked at."""
        self._bounds.look()
        return NotOwner(f"{what} is not on shard {self.shard}")

    async def _read_bounds(self) -> Sequence[Mapping[str, Any]]:
        return await self.read("select first, last from oncepay.ranges order by first", message="ranges")

    async def barrier(self, nonce: str) -> None:
        """Commit a transactional message with `nonce` and see the evidence, in a session of its own."""
        await self.write("select pg_logical_emit_message(true, 'oncepay', $1::text)", nonce)

    async def take_epoch(self, holder: str) -> int:
        """Become the shard's active worker: waits out the transactions of the one before, and uses the epoch from now on.

        Raises OutcomeUnknown: then take another.
        """
        self.epoch = int((await self.write("select oncepay.take_epoch($1)", holder))[0])
        return self.epoch

    async def read(self, query: str, *arguments: object, message: str = "list") -> Sequence[Mapping[str, Any]]:
        """Rows of a query (lists, not single payments), answered only behind the barrier.

        The barrier's commit goes on when the caller gives up. Its message HURRY asks the shard's feed to bring soon what was
        committed before. Raises ShardUnavailable, or InvalidField when the database refused an argument.
        """
        await self._reader_lock.acquire()
        reading = asyncio.create_task(self._read(query, arguments, message))
        reading.add_done_callback(self._has_read)
        return await asyncio.shield(reading)

    def _has_read(self, reading: asyncio.Task[Sequence[Mapping[str, Any]]]) -> None:
        self._reader_lock.release()
        if not reading.cancelled():
            reading.exception()  # its caller may have gone

    async def _read(self, query: str, arguments: tuple[object, ...], message: str) -> Sequence[Mapping[str, Any]]:
        connection = self._reader_session
        try:
            if connection is None or connection.is_closed():
                node = await self._leaders.wait(self.shard, CONNECT_S)
                connection = self._reader_session = await self._opened(node)
            rows: Sequence[Mapping[str, Any]] = await connection.fetch(query, *arguments)
            await connection.fetchval("select pg_logical_emit_message(true, 'oncepay', $1::text)", f"{self._actor} {message}")
            await self._prove(connection)
        except (*_LOST, asyncpg.PostgresError) as error:
            if isinstance(error, asyncpg.PostgresError) and (_is_data(error) or _is_schema(error)):
                raise _refusal(error) from error
            if connection is not None:
                connection.terminate()
            raise ShardUnavailable(f"shard {self.shard}: {error!r}") from error
        return rows

    async def write(self, query: str, *arguments: object) -> asyncpg.Record:
        """The one row of a query that commits something by itself and always emits a message, seen with the evidence.

        For single rows outside of the batches, one after the other: a function that locks its range, checks the ownership in
        the next statement and writes. Raises OutcomeUnknown, TooBusy, or InvalidField when the database refused a value. The
        commit goes on when the caller gives up.
        """
        if len(self._writes) >= WRITES_MAX:
            raise TooBusy(f"{WRITES_MAX} writes wait for shard {self.shard}")
        write = asyncio.create_task(self._in_barrier_session(query, arguments))
        self._writes.add(write)
        write.add_done_callback(self._written)
        return await asyncio.shield(write)

    def _written(self, write: asyncio.Task[asyncpg.Record]) -> None:
        self._writes.discard(write)
        if not write.cancelled():
            write.exception()  # its caller may have gone

    async def _in_barrier_session(self, query: str, arguments: tuple[object, ...]) -> asyncpg.Record:
        async with self._barrier_lock:
            connection = self._barrier_session
            try:
                if connection is None or connection.is_closed():
                    node = await self._leaders.wait(self.shard, CONNECT_S)
                    connection = self._barrier_session = await self._opened(node)
                    connection.add_termination_listener(lambda _: self.barrier_lost.set())
                row = await connection.fetchrow(query, *arguments)
                await self._prove(connection)
            except (*_LOST, ShardUnavailable, asyncpg.PostgresError) as error:
                if isinstance(error, asyncpg.PostgresError) and (_is_data(error) or _is_schema(error)):
                    raise _refusal(error) from error
                if isinstance(error, asyncpg.PostgresError) and error.sqlstate == "OP001":
                    raise EpochOver(str(error)) from error
                if connection is not None:
                    connection.terminate()
                raise OutcomeUnknown(f"{self.shard}: {error!r}") from error
            return row


def _is_data(error: asyncpg.PostgresError) -> bool:
    """Whether the error is about a row's values (class 22 or 23), so that another row may still pass."""
    return bool(error.sqlstate) and error.sqlstate[:2] in {"22", "23"}


def _is_schema(error: asyncpg.PostgresError) -> bool:
    """Whether the schema is not this code's (class 42), so that no retry helps."""
    return bool(error.sqlstate) and error.sqlstate[:2] == "42"


def _refusal(error: asyncpg.PostgresError) -> OncepayError:
    if _is_data(error):
        return InvalidField(f"the database refused the row: {error}")
    if _is_schema(error):
        return SchemaMismatch(str(error))
    return ShardUnavailable(f"the shard refused the batch: {error}")
