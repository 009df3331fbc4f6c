"""Values that go in and out of the etcd client."""

from __future__ import annotations

from typing import Literal

import msgspec


class KeyValue(msgspec.Struct, frozen=True):
    """A key as etcd holds it. `key` is relative to the deployment's prefix; revisions are etcd's; `lease` 0 is none."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int = 0
    lease: int = 0


class Event(msgspec.Struct, frozen=True):
    """One change seen by a watch. After a delete `kv.value` is empty and `kv.mod_revision` is the deletion's revision."""

    kind: Literal["put", "delete"]
    kv: KeyValue


class Resync(msgspec.Struct, frozen=True):
    """The whole content of the watched prefix at `revision`: events before it were lost, so replace what you hold."""

    kvs: list[KeyValue]
    revision: int


class Compare(msgspec.Struct, frozen=True):
    """One condition of a transaction: the key's last modification (0: absent), its lease, or its value."""

    key: str
    target: Literal["mod_revision", "create_revision", "value", "lease"]
    value: int | bytes
    result: Literal["=", "!=", "<", ">"] = "="


class Put(msgspec.Struct, frozen=True):
    """Write in a transaction."""

    key: str
    value: bytes
    lease: int = 0


class Delete(msgspec.Struct, frozen=True):
    """Delete in a transaction; with `prefix` all keys that begin with `key`."""

    key: str
    prefix: bool = False


class Get(msgspec.Struct, frozen=True):
    """Read in a transaction; with `prefix` all keys that begin with `key`."""

    key: str
    prefix: bool = False


Op = Put | Delete | Get


class TxnResult(msgspec.Struct, frozen=True):
    """`succeeded`: all compares held. `reads`: for each Get of the branch that ran, in order, what it found."""

    succeeded: bool
    revision: int
    reads: list[list[KeyValue]]


def mod_revision_is(key: str, mod_revision: int) -> Compare:
    """The key was last modified at `mod_revision`; 0 means that it doesn't exist."""
    return Compare(key, "mod_revision", mod_revision)


def absent(key: str) -> Compare:
    """The key doesn't exist."""
    return Compare(key, "create_revision", 0)


def present(key: str) -> Compare:
    """The key exists."""
    return Compare(key, "create_revision", 0, ">")


def value_is(key: str, value: bytes) -> Compare:
    """The key exists and holds exactly `value`."""
    return Compare(key, "value", value)
