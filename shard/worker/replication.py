"""A replication connection: asyncpg connects and authenticates, then the transport is ours and speaks CopyBoth.

asyncpg has no replication protocol, and psycopg2's replication connection moves the confirmed position by itself when a
keepalive comes (its issue #913), past what the aggregator has applied. Here nothing is confirmed but what `confirm` is
given. Formats: PostgreSQL documentation, "Streaming Replication Protocol".
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from typing import Any, Self

import asyncpg

from oncepay.errors import OncepayError
from oncepay.logs import get_logger

CONNECT_S = 5.0
QUERY_S = 10.0
FEEDBACK_S = 5.0
"""How often the position is repeated; well under any sensible wal_sender_timeout, also while reading is paused."""
SILENT_S = 15.0
"""A server that answered nothing for so long, though asked, is given up."""
WAITING_BYTES_MAX = 1 << 20
"""Undelivered payload beyond which reading from the socket pauses: the server then waits for us."""
FRAME_BYTES_MAX = 256 << 20
BUSY_S = 0.001
"""A server that sends again so soon sends every message by itself: its messages are then left to gather for"""
GATHER_S = 0.003
"""so long, unless so many bytes come at once anyway:"""
GATHERED_BYTES = 64 << 10

_POSTGRES_EPOCH_S = 946_684_800
_HEAD = struct.Struct(">BI")
_XLOG = struct.Struct(">QQQ")
_KEEPALIVE = struct.Struct(">QQB")
_STATUS = struct.Struct(">cQQQQB")

_log = get_logger("replication")

Rows = list[tuple[str | None, ...]]


class ReplicationClosed(OncepayError):
    """The replication connection is closed."""

    slug = "replication-closed"


class ReplicationError(ReplicationClosed):
    """The server ended the replication connection with an error."""

    def __init__(self, message: str, sqlstate: str) -> None:
        super().__init__(f"{message} ({sqlstate})")
        self.sqlstate = sqlstate


class ReplicationConnection(asyncio.Protocol):
    """One connection with `replication=database`: first queries, then one stream.

    connection = await ReplicationConnection.open(host, port, user, password, database, "worker-s0-1")
    rows = await connection.query("IDENTIFY_SYSTEM")
    await connection.stream('START_REPLICATION SLOT "feed" LOGICAL 0/0 (…)')
    payloads = await connection.read()
    """

    def __init__(self, session: asyncpg.Connection, transport: Any) -> None:
        self.server_lsn = 0
        """How far the server's log went when it last spoke. Proves nothing: only for measuring."""
        self.confirmed_lsn = 0
        self._session = session  # kept: it owns the authenticated connection
        self._transport = transport
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._needed_bytes = _HEAD.size
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._paused = False
        self._gathering: asyncio.TimerHandle | None = None
        self._streaming = False
        self._arrived = asyncio.Event()
        self._heard_at = time.monotonic()
        self._error: ReplicationClosed | None = None
        self._rows: Rows = []
        self._answer: asyncio.Future[Rows] | None = None
        self._ticks: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, host: str, port: int, user: str, password: str, database: str, name: str) -> Self:
        """Connect. Raises ReplicationClosed when that fails or takes longer than CONNECT_S."""
        try:
            session = await asyncpg.connect(
                host=host,
                port=port,
                user=user,
                password=password,
                database=database,
                ssl=False,
                timeout=CONNECT_S,
                server_settings={"replication": "database", "application_name": name},
            )
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise ReplicationClosed(f"{host}:{port}: {error!r}") from error
        transport = session._transport
        connection = cls(session, transport)
        transport.set_protocol(connection)
        connection._ticks = asyncio.create_task(connection._tick(), name="replication-feedback")
        return connection

    @property
    def closed(self) -> bool:
        return self._error is not None

    async def query(self, sql: str, timeout_s: float = QUERY_S) -> Rows:
        """The rows of one simple query, as text. Only before `stream`. Raises ReplicationClosed or ReplicationError."""
        return await self._command(sql, timeout_s)

    async def stream(self, command: str) -> None:
        """Send START_REPLICATION; returns when the server has begun."""
        await self._command(command)

    async def _command(self, sql: str, timeout_s: float = QUERY_S) -> Rows:
        self._check()
        assert self._answer is None, "one command at a time"
        assert not self._streaming, "no command while streaming"
        self._rows = []
        self._answer = asyncio.get_running_loop().create_future()
        text = sql.encode() + b"\0"
        self._transport.write(_HEAD.pack(ord("Q"), 4 + len(text)) + text)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._answer
        except TimeoutError:
            self.close()
            raise ReplicationClosed(f"no answer in {timeout_s:.0f} s") from None
        finally:
            self._answer = None

    async def read(self, timeout_s: float | None = None) -> list[bytes]:
        """What has come since the last call: at least one message of the plugin, or none after `timeout_s`.

        Raises ReplicationClosed after all that came before the end has been read.
        """
        if not self._waiting:
            self._check()
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return []
            if not self._waiting:
                self._check()
        payloads, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if self._paused and not self.closed:
            self._paused = False
            self._heard_at = time.monotonic()
            self._go_on()
        return payloads

    def confirm(self, lsn: int) -> None:
        """Let the server forget what is before `lsn`. Lower positions than before are ignored."""
        if lsn > self.confirmed_lsn:
            self.confirmed_lsn = lsn
            if self._streaming and not self.closed:
                self._feedback()

    def close(self) -> None:
        """Drop the connection at once, without a word."""
        self._end(ReplicationClosed("closed by us"))
        self._transport.abort()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        before_at, self._heard_at = self._heard_at, time.monotonic()
        self._parts.append(data)
        self._parts_bytes += len(data)
        if self._parts_bytes < self._needed_bytes:
            return
        whole = data if len(self._parts) == 1 else b"".join(self._parts)
        try:
            offset = self._frames(whole)
        except (struct.error, ValueError, IndexError, ReplicationClosed) as error:
            closed = error if isinstance(error, ReplicationClosed) else ReplicationClosed(f"a bad frame: {error!r}")
            self._end(closed)
            self._transport.abort()
            return
        self._parts = [whole[offset:]] if offset < len(whole) else []
        self._parts_bytes = len(whole) - offset
        if self._waiting:
            self._arrived.set()
        if self._waiting_bytes > WAITING_BYTES_MAX:
            self._pause()
            self._paused = True
        elif self._streaming and len(data) < GATHERED_BYTES and self._heard_at - before_at < BUSY_S:
            self._gather()

    def _frames(self, data: bytes) -> int:
        """Take all whole frames, and note how many bytes the next one needs. Returns where it begins."""
        offset, size, last = 0, len(data), -1
        waiting, unpack = self._waiting, _HEAD.unpack_from
        while size - offset >= 5:
            kind, length = unpack(data, offset)
            if not 4 <= length <= FRAME_BYTES_MAX:
                raise ReplicationClosed(f"a frame of {length} bytes")
            end = offset + 1 + length
            if end > size:
                self._needed_bytes = 1 + length
                break
            if kind == _COPY_DATA and length > _WAL_HEAD and data[offset + 5] == _WAL:
                waiting.append(data[offset + 30 : end])
                self._waiting_bytes += length
                last = offset
            else:
                self._frame(kind, data[offset + 5 : end])
            offset = end
        else:
            self._needed_bytes = _HEAD.size
        if last >= 0:
            self.server_lsn = _XLOG.unpack_from(data, last + 6)[1]
        return offset

    def _pause(self) -> None:
        if not self._paused and self._gathering is None:
            self._transport.pause_reading()

    def _go_on(self) -> None:
        if not self._paused and self._gathering is None and not self.closed:
            self._transport.resume_reading()

    def _gather(self) -> None:
        """Don't wake for every message of a server that sends one after the other."""
        self._pause()
        if self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(GATHER_S, self._gathered)

    def _gathered(self) -> None:
        self._gathering = None
        self._go_on()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(ReplicationClosed(f"connection lost: {error!r}" if error else "the server closed the connection"))
        self._session._protocol.connection_lost(error)  # so that asyncpg knows it too

    def _frame(self, kind: int, data: bytes) -> None:
        """One frame that isn't a message of the plugin."""
        if kind == _COPY_DATA:
            if data[:1] == b"k":
                self.server_lsn, _, wants_reply = _KEEPALIVE.unpack_from(data, 1)
                if wants_reply:
                    self._feedback()
        else:
            handler = _HANDLERS.get(kind)
            if handler is not None:
                handler(self, data)

    def _copy_both(self, data: bytes) -> None:
        self._streaming = True
        self._feedback()
        self._set_answer()

    def _data_row(self, data: bytes) -> None:
        (count,) = struct.unpack_from(">H", data)
        offset = 2
        row: list[str | None] = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", data, offset)
            offset += 4
            row.append(data[offset : offset + length].decode() if length >= 0 else None)
            offset += max(length, 0)
        self._rows.append(tuple(row))

    def _ready_for_query(self, data: bytes) -> None:
        if self._streaming:
            raise ReplicationClosed("the server ended the stream")
        self._set_answer()

    def _error_response(self, data: bytes) -> None:
        fields = {part[:1]: part[1:].decode(errors="replace") for part in data.split(b"\0") if part}
        raise ReplicationError(fields.get(b"M", "unknown error"), fields.get(b"C", ""))

    def _copy_done(self, data: bytes) -> None:
        raise ReplicationClosed("the server ended the stream")

    def _set_answer(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._rows)

    # Feedback

    def _feedback(self, *, reply: bool = False) -> None:
        now_us = int((time.time() - _POSTGRES_EPOCH_S) * 1e6)
        lsn = self.confirmed_lsn
        status = _STATUS.pack(b"r", lsn, lsn, lsn, now_us, reply)
        self._transport.write(_HEAD.pack(_COPY_DATA, 4 + len(status)) + status)

    async def _tick(self) -> None:
        """Repeat the position, ask for an answer, and give up a server that has none."""
        while not self.closed:
            await asyncio.sleep(FEEDBACK_S)
            if not self._streaming or self.closed:
                continue
            if not self._paused and time.monotonic() - self._heard_at > SILENT_S:
                self._end(ReplicationClosed(f"the server was silent for {SILENT_S:.0f} s"))
                self._transport.abort()
                return
            self._feedback(reply=True)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _end(self, error: ReplicationClosed) -> None:
        if self._error is None:
            self._error = error
            if self._ticks is not None:
                self._ticks.cancel()
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(error)
            self._arrived.set()


_COPY_DATA, _WAL = b"dw"
_WAL_HEAD = 4 + 1 + _XLOG.size
"""Length, kind and positions before a message of the plugin: 29 bytes, after the frame's own kind."""
_HANDLERS: dict[int, Callable[[ReplicationConnection, bytes], None]] = {
    ord("W"): ReplicationConnection._copy_both,
    ord("D"): ReplicationConnection._data_row,
    ord("Z"): ReplicationConnection._ready_for_query,
    ord("E"): ReplicationConnection._error_response,
    ord("c"): ReplicationConnection._copy_done,
}
