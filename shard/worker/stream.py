"""Opening the shard's slot on the leader: who is this node, where does the slot stand, may we read it.

A slot that has lost its log is made anew, so that the pending cache lives on. What was committed in between never comes: the
slot then begins past the aggregator's position, which halts the forwarder (forward.py), and past what a filled cache has been
told, which ends the worker's turn (feed.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from oncepay.feed import lsn_text, parse_lsn
from oncepay.logs import get_logger
from oncepay.settings import Settings
from shard.store.leader import Node
from shard.worker.errors import StandDown, WrongNode
from shard.worker.replication import ReplicationConnection

SLOT = "oncepay_feed"
PUBLICATION = "oncepay_feed"
ROLE = "oncepay_worker"
TERMINATE_MS = 3_000
"""How long the walsender of a worker that was replaced may take to end."""
SLOT_S = 60.0
"""How long making a slot may take: it waits for all transactions that were running when it began."""

_log = get_logger("stream")

OPTIONS = f"(proto_version '1', publication_names '{PUBLICATION}', binary 'true', messages 'true', origin 'none')"
_START = f'START_REPLICATION SLOT "{SLOT}" LOGICAL 0/0 {OPTIONS}'
_STATE = f"""
    select pg_is_in_recovery(), i.incarnation, w.epoch, w.fed,
        s.slot_name, s.confirmed_flush_lsn, s.active_pid, s.wal_status
    from oncepay.identity i
    cross join oncepay.worker_epoch w
    left join pg_replication_slots s on s.slot_name = '{SLOT}' and s.database = current_database()
"""  # noqa: S608  (a constant)
_OWN = f"slot_name = '{SLOT}' and database = current_database()"
_KEPT = f"select w.fed, s.wal_status from oncepay.worker_epoch w left join pg_replication_slots s on {_OWN}"  # noqa: S608
_DROP_LOST = f"""
    select pg_drop_replication_slot(slot_name) from pg_replication_slots where {_OWN} and wal_status = 'lost'
"""  # noqa: S608


class LeaderView(Protocol):
    """Who leads a shard: `shard.store.leader.Leaders`, or one node that is known to."""

    def current(self, shard: str) -> Node | None: ...

    async def wait(self, shard: str, timeout_s: float) -> Node: ...

    def on_change(self, callback: Callable[[str], None]) -> None: ...


class Stream(msgspec.Struct, frozen=True):
    """An open stream. It begins after `start_lsn`, the slot's confirmed position, in the shard's history `incarnation`.

    `fed`: the shard knows that the aggregator has had something of its feed.
    """

    connection: ReplicationConnection
    node: Node
    timeline: int
    incarnation: str
    start_lsn: int
    log_end_lsn: int
    fed: bool


async def open_stream(node: Node, settings: Settings, name: str, epoch: int) -> Stream:
    """Connect to `node` and start the slot as the worker that holds `epoch`.

    Raises WrongNode when this node isn't (or is no more) the leader, StandDown when another worker has taken the shard
    over, ReplicationClosed when the connection fails.
    """
    postgres = settings.postgres
    connection = await ReplicationConnection.open(node.host, node.port, ROLE, postgres.worker_password, postgres.database, name)
    try:
        return await _start(connection, node, epoch)
    except BaseException:
        connection.close()
        raise


async def _start(connection: ReplicationConnection, node: Node, epoch: int) -> Stream:
    [(_, timeline, log_end, _)] = await connection.query("IDENTIFY_SYSTEM")
    rows = await connection.query(_STATE)
    if not rows:
        raise WrongNode(f"{node.name} has no identity yet")
    [(in_recovery, incarnation, node_epoch, fed, slot, confirmed, active_pid, wal_status)] = rows
    if timeline is None or log_end is None or incarnation is None or node_epoch is None:
        raise WrongNode(f"{node.name} has no identity yet")
    if in_recovery == "t":
        raise WrongNode(f"{node.name} is a standby")
    if int(node_epoch) > epoch:
        raise StandDown(f"epoch {epoch} is over: the shard's worker holds {node_epoch}")
    if int(node_epoch) < epoch:
        raise WrongNode(f"{node.name} knows epoch {node_epoch} only, not {epoch}")
    lost = wal_status == "lost"
    if active_pid is not None and (lost or confirmed is not None):  # else it is being made
        await _terminate(connection, int(active_pid))
    if lost or (slot is None and fed == "t"):
        await revive_slot(connection, epoch)
        return await _start(connection, node, epoch)
    if confirmed is None:
        raise WrongNode(f"{node.name} has no slot {SLOT} yet")
    start_lsn = parse_lsn(confirmed)
    connection.confirmed_lsn = start_lsn
    await connection.stream(_START)
    _log.info("stream opened", node=node.name, timeline=int(timeline), start=lsn_text(start_lsn), log_end=log_end)
    return Stream(connection, node, int(timeline), incarnation, start_lsn, parse_lsn(log_end), fed == "t")


async def revive_slot(connection: ReplicationConnection, epoch: int) -> None:
    """Make sure that the feed's slot exists and has its log: whatever is committed from now on is in it.

    The shard keeps first that its feed can't begin anew: an aggregator that knows no position would be taken for one that lacks
    nothing. On this connection that waits for no quorum: a node that lost it again has its own slot.
    """
    [(fed, wal_status)] = await connection.query(_KEPT)
    if wal_status not in (None, "lost"):
        return
    if fed != "t":
        await connection.query("set synchronous_commit = local")  # a walsender that waited for standbys would take their place
        await connection.query(f"select oncepay.feed_applied({epoch})")
    await connection.query(_DROP_LOST)
    await connection.query(f"select pg_create_logical_replication_slot('{SLOT}', 'pgoutput')", SLOT_S)
    _log.warning("the feed's slot was made anew", slot=SLOT, lost=wal_status is not None)


async def _terminate(connection: ReplicationConnection, pid: int) -> None:
    """End the walsender of the worker before us, which may be frozen: its epoch is over, and the slot takes one reader."""
    [(gone,)] = await connection.query(f"select pg_terminate_backend({pid}, {TERMINATE_MS})")
    _log.info("walsender of the worker before ended", pid=pid, gone=gone == "t")
