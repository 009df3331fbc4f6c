"""What an operator does to the pool: a new MAC secret, and giving up all blocks after etcd was restored."""

from __future__ import annotations

import secrets
import time
from typing import Literal

import msgspec

from keygen.records import BLOCKS, MAC, PREFIX
from oncepay.errors import WrongState
from oncepay.etcd import Etcd
from oncepay.keys import SECRET_BYTES, MacSecrets

KNOWN_AFTER_S = 60.0
"""By then every router and key service has read a secret that was added: several times their mirrors' period."""
SECRETS_KEPT = 8
NUMBERS = 256


class Rotation(msgspec.Struct, frozen=True):
    """What `rotate` did, or would do: a secret was `added`, or `switched` to. `dropped` are numbers that left."""

    step: Literal["added", "switched"]
    number: int
    current: int
    dropped: list[int]
    dry_run: bool = False


async def rotate(etcd: Etcd, *, dry_run: bool = False) -> Rotation:
    """One of the two steps to a new MAC secret: add one, and in a second call, KNOWN_AFTER_S later, make keys with it.

    Keys whose secret was dropped are still accepted where their payment exists. WrongState when there is no pool yet,
    when it is too early for the second step, or when someone else rotates at the same time.
    """
    key = PREFIX + MAC
    kv = await etcd.get(key)
    if kv is None:
        raise WrongState("there is no MAC secret yet: no key service has run on this deployment")
    record = msgspec.json.decode(kv.value, type=MacSecrets)
    newest = list(record.secrets)[-1]
    if newest == record.current:
        number = (newest + 1) % NUMBERS
        kept = dict(list(record.secrets.items())[-(SECRETS_KEPT - 1) :])
        kept[number] = secrets.token_bytes(SECRET_BYTES)
        made = MacSecrets(record.current, kept, time.time())
        step: Literal["added", "switched"] = "added"
    else:
        left_s = record.added_at + KNOWN_AFTER_S - time.time()
        if left_s > 0:
            raise WrongState(f"secret {newest} was added just now; switch to it in {left_s:.0f} s")
        made = MacSecrets(newest, record.secrets, record.added_at)
        step, number = "switched", newest
    if not dry_run and await etcd.compare_and_put(key, msgspec.json.encode(made), kv.mod_revision) is None:
        raise WrongState("someone else changed the MAC secrets at the same time")
    dropped = [number for number in record.secrets if number not in made.secrets]
    return Rotation(step, number, made.current, dropped, dry_run)


async def retire_all(etcd: Etcd, *, dry_run: bool = False) -> int:
    """Give up every block, so that none of its keys is issued any more; how many there were. New ones are made at need.

    For after etcd was restored from a backup, whose watermarks lie behind what was issued. Key services must not run.
    """
    prefix = PREFIX + BLOCKS
    return await etcd.count(prefix) if dry_run else await etcd.delete_prefix(prefix)
