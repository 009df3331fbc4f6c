"""What the pool keeps in etcd, all of it under `keys/`."""

from __future__ import annotations

import msgspec

from oncepay.etcd import KeyValue

PREFIX = "keys/"
MAC = "mac"
BLOCKS = "blocks/"
OWNERS = "owners/"

SMALLEST_BLOCK_KEYS = 1 << 16
BLOCK_KEYS = 1 << 24


class BlockRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One block at `keys/blocks/<id>`: `size` keys, made from the secret `seed` by their index.

    Indexes below `watermark` belong to the owners so far and are never given out again; who owns the block now may raise
    it, and issues only what it raised it over itself. `owner` lives while the leased key `keys/owners/<owner>` exists; a
    block without a living owner is free to be taken over. At `watermark == size` the block is used up and its seed wiped.
    """

    size: int
    watermark: int = 0
    owner: str = ""
    seed: bytes = b""

    @property
    def used_up(self) -> bool:
        return self.watermark >= self.size


class Block(msgspec.Struct, frozen=True):
    """A block's record as it was read or written at `mod_revision`."""

    id: str
    record: BlockRecord
    mod_revision: int

    @property
    def key(self) -> str:
        return block_key(self.id)


def block_key(block_id: str) -> str:
    """The block's key in etcd, relative to the deployment."""
    return PREFIX + BLOCKS + block_id


def owner_key(owner: str) -> str:
    """The owner's key in etcd, relative to the deployment."""
    return PREFIX + OWNERS + owner


def read_block(kv: KeyValue) -> Block:
    """The block that `kv` holds; msgspec.DecodeError when it can't be read."""
    return Block(kv.key[len(PREFIX) + len(BLOCKS) :], msgspec.json.decode(kv.value, type=BlockRecord), kv.mod_revision)
