"""Making a backlog certain before it is read: a barrier that is seen in a stream of its own, which begins at the log's end.

The barrier's nonce comes behind all that the feed's slot holds. Of a large backlog it would come only when more had been read
than may be held back, and everything would have to be read twice. Any stream of the node proves as much as the slot's: a log
that holds the barrier holds exactly what the quorum holds before it (sieve.py).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from oncepay.errors import OncepayError
from oncepay.feed import lsn_text
from oncepay.logs import get_logger
from oncepay.settings import Settings
from shard.store.leader import Node
from shard.worker.errors import WrongNode
from shard.worker.replication import ReplicationConnection
from shard.worker.sieve import Sieve
from shard.worker.stream import OPTIONS, ROLE, SLOT
from shard.worker.transactions import Assembler

AHEAD_BYTES = 16 << 20
"""A backlog of less log is read as it comes."""
AHEAD_S = 15.0
"""How long it may take, with the slot, which waits for all transactions that were running. Then the backlog is read twice."""

_log = get_logger("feed")


class Certain(NamedTuple):
    """All before `lsn` is certain in the log of the node, which is on `timeline`."""

    lsn: int
    timeline: int


async def look_ahead(
    node: Node, settings: Settings, name: str, epoch: int, barrier: Callable[[str], Awaitable[None]]
) -> Certain | None:
    """Commit a barrier and see it on `node`; None when that proved nothing. A commit that is in flight is never canceled."""
    try:
        async with asyncio.timeout(AHEAD_S):
            return await _seen(node, settings, name, epoch, barrier)
    except (OncepayError, TimeoutError) as error:
        _log.info("backlog not certain ahead", node=node.name, problem=str(error) or repr(error))
        return None


async def _seen(
    node: Node, settings: Settings, name: str, epoch: int, barrier: Callable[[str], Awaitable[None]]
) -> Certain | None:
    postgres = settings.postgres
    password, database = postgres.worker_password, postgres.database
    connection = await ReplicationConnection.open(node.host, node.port, ROLE, password, database, f"{name} ahead")
    try:
        timeline = await _start(connection, epoch)
        nonce = f"{name}:{epoch}:{uuid.uuid4().hex}"
        sieve = Sieve()
        sieve.connected(timeline)
        sieve.begun(nonce)
        commit = asyncio.ensure_future(barrier(nonce))
        await asyncio.shield(commit)
        sieve.acknowledged(nonce)
        await _read(connection, sieve)
    finally:
        connection.close()
    if sieve.waits:
        return None
    _log.info("backlog certain ahead", node=node.name, timeline=timeline, lsn=lsn_text(sieve.certain_lsn))
    return Certain(sieve.certain_lsn, timeline)


async def _start(connection: ReplicationConnection, epoch: int) -> int:
    """Begin a stream at the end of the node's log; the node's timeline."""
    [(_, timeline, _, _)] = await connection.query("IDENTIFY_SYSTEM")
    if timeline is None:
        raise WrongNode("the node doesn't say its timeline")
    slot = f'"{SLOT}_ahead_{epoch}"'
    await connection.query(f"CREATE_REPLICATION_SLOT {slot} TEMPORARY LOGICAL pgoutput (SNAPSHOT 'nothing')", AHEAD_S)
    await connection.stream(f"START_REPLICATION SLOT {slot} LOGICAL 0/0 {OPTIONS}")
    return int(timeline)


async def _read(connection: ReplicationConnection, sieve: Sieve) -> None:
    """Read until the barrier has come. What else comes is nothing here: the feed's own slot has it too."""
    assembler = Assembler()
    while sieve.waits:
        for payload in await connection.read():
            transaction = assembler.feed(payload)
            if transaction is not None:
                sieve.add(transaction)
