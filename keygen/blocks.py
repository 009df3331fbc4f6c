"""Blocks in etcd: made, taken over, moved on, used up.

The invariant: an owner issues an index only after it has seen, by an acknowledgement or a linearizable read, that its own
write raised the watermark past it. Owner names are never used twice, every write compares the record's revision, and
watermarks only rise; so each index has one owner, however late a frozen owner wakes up or a lost write lands. No clock and
no lease has a part in that: leases only tell when a block may be taken over, and taking one over too early is harmless.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

import msgspec
from prometheus_client import Counter

from keygen.records import (
    BLOCKS,
    MAC,
    OWNERS,
    PREFIX,
    Block,
    BlockRecord,
    owner_key,
    read_block,
)
from oncepay.errors import EtcdUnavailable, OncepayError
from oncepay.etcd import Compare, Etcd, EtcdOutcomeUnknown, Lease, Mirror, Put, absent, mod_revision_is
from oncepay.keys import SECRET_BYTES, MacSecrets
from oncepay.logs import get_logger

LEASE_TTL_S = 7
"""The blocks of a replica that died can be taken over this long after its last sign of life, and a second at most."""
RETIRED_KEPT = 16
MIRROR_WAIT_S = 2.0
LEAVE_S = 2.0

TAKEOVERS = Counter("oncepay_keys_takeovers", "Blocks taken over from a replica that was gone.")
ETCD_WRITES = Counter("oncepay_keys_etcd_writes", "Writes to etcd, whatever came of them.")

_log = get_logger("keygen")


@dataclass(frozen=True, slots=True)
class Grant:
    """Indexes `first` to `end - 1` of the block with `seed` are this process's now."""

    seed: bytes
    first: int
    end: int


class Blocks:
    """The pool's records as one replica sees and changes them. All methods raise EtcdUnavailable when etcd is away."""

    def __init__(self, etcd: Etcd, name: str, block_keys: int) -> None:
        self.owner = f"{name}-{secrets.token_hex(6)}"
        self.mirror = Mirror(etcd, PREFIX)
        self._etcd = etcd
        self.block_keys = block_keys
        self._lease: Lease | None = None
        self._held: dict[str, tuple[Block, bytes]] = {}
        self._granted: dict[bytes, int] = {}
        """By seed, the end of what this process was granted: nothing below it is granted again, whatever is read."""

    # What is there

    def all(self) -> list[Block]:
        """Every block record, by id."""
        return sorted((read_block(kv) for key, kv in self.mirror.kvs.items() if key.startswith(BLOCKS)), key=lambda b: b.id)

    def owners(self) -> set[str]:
        """The owners whose lease lives."""
        return {key[len(OWNERS) :] for key in self.mirror.kvs if key.startswith(OWNERS)}

    def free(self) -> list[Block]:
        """Blocks that can be taken over, those that were begun first."""
        owners = self.owners()
        free = [b for b in self.all() if not b.record.used_up and b.record.owner not in owners and b.id not in self._held]
        return sorted(free, key=lambda block: -block.record.watermark)

    def secrets(self) -> MacSecrets | None:
        """The MAC secrets, None until they were read or made."""
        kv = self.mirror.get(MAC)
        return msgspec.json.decode(kv.value, type=MacSecrets) if kv else None

    @property
    def registered(self) -> bool:
        return self._lease is not None and self._lease.held

    # What a replica does

    async def register(self) -> None:
        """Say under a lease that this owner lives; again after the lease was lost."""
        if self.registered:
            return
        ETCD_WRITES.inc(2)
        lease = await self._etcd.grant_lease(LEASE_TTL_S)
        try:
            await self._etcd.put(owner_key(self.owner), b"", lease.id)
        except OncepayError:
            await lease.revoke()
            raise
        self._lease = lease

    async def leave(self) -> None:
        """Give the lease back, so that others may take the blocks over at once."""
        if self._lease is not None:
            try:
                async with asyncio.timeout(LEAVE_S):
                    await self._lease.revoke()
            except TimeoutError:
                _log.info("lease not given back, it will end by itself", owner=self.owner)

    async def ensure_secrets(self) -> None:
        """Make the first MAC secret, unless someone else has."""
        if self.mirror.get(MAC) is None:
            first = MacSecrets(1, {1: secrets.token_bytes(SECRET_BYTES)})
            ETCD_WRITES.inc()
            revision = await self._etcd.compare_and_put(PREFIX + MAC, msgspec.json.encode(first), 0)
            await self._shown(revision)

    async def grant(self, count: int) -> Grant | None:
        """Up to `count` more indexes, from a block held, else a free one, else a new one. None: try again."""
        for block, seed in self._held.values():
            return await self._raise(block, seed, count)
        for block in (*self._unheld(), *self.free()):
            return await self._raise(block, block.record.seed, count)
        return await self._raise(self._new_block(), secrets.token_bytes(SECRET_BYTES), count)

    def _unheld(self) -> list[Block]:
        """Blocks that became this owner's by a write whose answer never came, and which landed after it was looked for."""
        return [b for b in self.all() if b.record.owner == self.owner and not b.record.used_up and b.id not in self._held]

    async def add_free_block(self) -> None:
        """One more block that nobody owns yet."""
        block = self._new_block()
        record = BlockRecord(self.block_keys, seed=secrets.token_bytes(SECRET_BYTES))
        ETCD_WRITES.inc()
        await self._shown(await self._etcd.compare_and_put(block.key, msgspec.json.encode(record), 0))

    async def tidy(self) -> int:
        """Delete records of blocks long used up, the oldest first; how many."""
        used_up = [block for block in self.all() if block.record.used_up]
        surplus = used_up[:-RETIRED_KEPT]
        for block in surplus:
            ETCD_WRITES.inc()
            await self._etcd.compare_and_delete(block.key, block.mod_revision)
        return len(surplus)

    # How a watermark moves

    def _new_block(self) -> Block:
        last = max((int(block.id) for block in self.all()), default=0)
        return Block(f"{last + 1:012}", BlockRecord(self.block_keys), 0)

    async def _raise(self, block: Block, seed: bytes, count: int) -> Grant | None:
        """Make `block` this owner's with its watermark raised by up to `count`. None when it isn't, or not known to be."""
        old = block.record
        watermark = min(old.watermark + count, old.size)
        used_up = watermark == old.size
        new = BlockRecord(old.size, watermark, self.owner, b"" if used_up else seed)
        compares: list[Compare] = [mod_revision_is(block.key, block.mod_revision)]
        if old.owner not in ("", self.owner):
            compares.append(absent(owner_key(old.owner)))
        ETCD_WRITES.inc()
        try:
            result = await self._etcd.txn(compares, [Put(block.key, msgspec.json.encode(new))])
            written = Block(block.id, new, result.revision) if result.succeeded else None
        except EtcdOutcomeUnknown:
            written = None
        if written is None:
            written = await self._read_back(block, seed)
        if written is None:
            self._held.pop(block.id, None)
            return None
        if old.owner not in ("", self.owner):
            TAKEOVERS.inc()
            _log.info("block taken over", block=block.id, from_owner=old.owner, watermark=old.watermark)
        return await self._hold(written, seed, old.watermark)

    async def _read_back(self, block: Block, seed: bytes) -> Block | None:
        """The block as it is, if it is this owner's and not behind what was granted; None when it is someone else's."""
        kv = await self._etcd.get(block.key)
        if kv is None:
            return None
        found = read_block(kv)
        if found.record.owner != self.owner:
            await self._shown(found.mod_revision)
            return None
        if found.record.watermark < self._granted.get(seed, 0):
            _log.error("etcd went back in time; the block is given up", block=block.id, watermark=found.record.watermark)
            ETCD_WRITES.inc()
            await self._etcd.compare_and_delete(block.key, found.mod_revision)
            return None
        return found

    async def _hold(self, block: Block, seed: bytes, first: int) -> Grant:
        """Remember what the record says now, and grant what is new in it."""
        end = block.record.watermark
        first = max(first, self._granted.get(seed, 0))
        if block.record.used_up:
            self._held.pop(block.id, None)
            _log.info("block used up", block=block.id)
        else:
            self._held[block.id] = (block, seed)
        self._granted[seed] = max(first, end)
        await self._shown(block.mod_revision)
        return Grant(seed, first, max(first, end))

    async def _shown(self, revision: int | None) -> bool:
        """Whether the mirror shows what was written at `revision` soon; None is a write that someone else came before."""
        try:
            await self.mirror.wait_revision(revision or self.mirror.revision, MIRROR_WAIT_S)
        except EtcdUnavailable:
            return False
        return True
