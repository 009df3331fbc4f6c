"""The client: reads, writes and transactions, each with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Self

from aetcd import rpc

from oncepay.errors import EtcdUnavailable
from oncepay.etcd.errors import EtcdOutcomeUnknown, EtcdRefused, LeaseNotFound
from oncepay.etcd.lease import Lease
from oncepay.etcd.members import METADATA, Member, Members, NotConnected
from oncepay.etcd.types import Compare, Delete, Get, KeyValue, Op, Put, TxnResult, mod_revision_is
from oncepay.etcd.watch import Watch
from oncepay.logs import get_logger
from oncepay.settings import EtcdSettings

TIMEOUT_S = 5.0
ATTEMPT_S = 2.0
CONNECT_S = 1.0
RETRY_PAUSE_S = 0.05

_NOT_APPLIED = ("etcdserver: no leader", "etcdserver: not capable", "etcdserver: server stopped")
_MOVE_ON = (rpc.StatusCode.UNAVAILABLE, rpc.StatusCode.DEADLINE_EXCEEDED, rpc.StatusCode.UNKNOWN, rpc.StatusCode.CANCELLED)
_TARGETS = {"create_revision": 1, "mod_revision": 2, "value": 3, "lease": 4}
_RESULTS = {"=": 0, ">": 1, "<": 2, "!=": 3}

_log = get_logger("etcd")


class Etcd:
    """A deployment's part of etcd: all keys are relative to `settings.prefix`.

    Safe for many tasks of one event loop. Reads are linearizable and are tried again at other members until `timeout_s`
    is over; a write is sent once, and only over a connection that stands, so that EtcdUnavailable always means "it was
    not done" and EtcdOutcomeUnknown "it may have been done".
    """

    def __init__(self, settings: EtcdSettings, *, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self.members = Members(settings)
        self._prefix = settings.prefix.rstrip("/") + "/"
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Start connecting. Never fails because etcd is away."""
        self.members.current().open()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.members.close()

    # Reads

    async def get(self, key: str) -> KeyValue | None:
        """The key, or None when it doesn't exist."""
        answer = await self._read("Range", rpc.RangeRequest(key=self.full(key)))
        return self.key_value(answer.kvs[0]) if answer.kvs else None

    async def get_prefix(self, prefix: str) -> tuple[list[KeyValue], int]:
        """All keys that begin with `prefix`, by key, and the revision at which they were read."""
        key = self.full(prefix)
        answer = await self._read("Range", rpc.RangeRequest(key=key, range_end=prefix_end(key)))
        return [self.key_value(kv) for kv in answer.kvs], int(answer.header.revision)

    async def count(self, prefix: str) -> int:
        """How many keys begin with `prefix`."""
        key = self.full(prefix)
        answer = await self._read("Range", rpc.RangeRequest(key=key, range_end=prefix_end(key), count_only=True))
        return int(answer.count)

    # Writes

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write the key whatever was there; the new revision."""
        answer = await self._write("Put", rpc.PutRequest(key=self.full(key), value=value, lease=lease))
        return int(answer.header.revision)

    async def delete(self, key: str) -> bool:
        """Delete the key; whether it was there."""
        answer = await self._write("DeleteRange", rpc.DeleteRangeRequest(key=self.full(key)))
        return bool(answer.deleted)

    async def delete_prefix(self, prefix: str) -> int:
        """Delete all keys that begin with `prefix`; how many there were."""
        key = self.full(prefix)
        answer = await self._write("DeleteRange", rpc.DeleteRangeRequest(key=key, range_end=prefix_end(key)))
        return int(answer.deleted)

    async def compare_and_put(self, key: str, value: bytes, mod_revision: int, lease: int = 0) -> int | None:
        """Write the key if it was last modified at `mod_revision` (0: if it is absent). The new revision, or None."""
        result = await self.txn([mod_revision_is(key, mod_revision)], [Put(key, value, lease)])
        return result.revision if result.succeeded else None

    async def compare_and_delete(self, key: str, mod_revision: int) -> bool:
        """Delete the key if it was last modified at `mod_revision`; whether that was so."""
        return (await self.txn([mod_revision_is(key, mod_revision)], [Delete(key)])).succeeded

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        """All of `then` when every compare holds, else all of `otherwise`, atomically."""
        request = rpc.TxnRequest(
            compare=[self._compare(compare) for compare in compares],
            success=[self._op(op) for op in then],
            failure=[self._op(op) for op in otherwise],
        )
        only_reads = all(isinstance(op, Get) for op in (*then, *otherwise))
        answer = await (self._read if only_reads else self._write)("Txn", request)
        reads = [
            [self.key_value(kv) for kv in response.response_range.kvs]
            for response in answer.responses
            if response.HasField("response_range")
        ]
        return TxnResult(bool(answer.succeeded), int(answer.header.revision), reads)

    # Leases and watches

    async def grant_lease(self, ttl_s: int) -> Lease:
        """A lease that is kept alive in the background until it is revoked or lost."""
        asked_at = time.monotonic()
        answer = await self._write("LeaseGrant", rpc.LeaseGrantRequest(TTL=ttl_s), service="lease")
        lease = Lease(self.members, int(answer.ID), int(answer.TTL), asked_at, self._revoke_lease)
        self._keep(lease.start())
        return lease

    async def lease_ids(self) -> set[int]:
        """The ids of all leases that are alive now."""
        answer = await self._read("LeaseLeases", rpc.LeaseLeasesRequest(), service="lease")
        return {int(status.ID) for status in answer.leases}

    def watch_prefix(self, prefix: str, from_revision: int) -> Watch:
        """Changes of keys that begin with `prefix`, from `from_revision` on: see Watch."""
        return Watch(self, prefix, from_revision)

    # Members

    async def member_versions(self, timeout_s: float = ATTEMPT_S) -> dict[str, str]:
        """The server version of each endpoint; an endpoint that doesn't answer has none."""

        async def ask(member: Member) -> tuple[str, str]:
            try:
                await member.ready(CONNECT_S)
                answer = await member.maintenance.Status(rpc.StatusRequest(), timeout=timeout_s)
            except (NotConnected, rpc.AioRpcError):
                return member.endpoint, ""
            return member.endpoint, str(answer.version)

        return dict(await asyncio.gather(*(ask(member) for member in self.members)))

    async def warn_of_old_members(self) -> None:
        """Log a warning for each member whose version is known to lose consistency on a crash."""
        for endpoint, version in (await self.member_versions()).items():
            if version in ("3.5.0", "3.5.1", "3.5.2"):
                advice = "can lose consistency on a crash; use 3.5.21 or later in production"
                _log.warning("etcd server is too old", endpoint=endpoint, version=version, advice=advice)

    async def _revoke_lease(self, lease_id: int) -> None:
        await self._write("LeaseRevoke", rpc.LeaseRevokeRequest(ID=lease_id), service="lease")

    # Sending

    async def _read(self, method: str, request: object, *, service: str = "kv") -> Any:
        deadline = time.monotonic() + self.timeout_s
        problem = "no time was given"
        tries = 0
        while (left_s := deadline - time.monotonic()) > 0:
            member = self.members.current()
            try:
                await member.ready(min(left_s, CONNECT_S))
                call = getattr(getattr(member, service), method)
                return await call(request, timeout=min(left_s, ATTEMPT_S), metadata=METADATA)
            except NotConnected as error:
                problem = str(error)
            except rpc.AioRpcError as error:
                if error.code() not in _MOVE_ON:
                    raise _refused(error) from error
                problem = f"{member.endpoint}: {error.details()}"
            self.members.failed(member)
            tries += 1
            if tries % len(self.members) == 0:
                await asyncio.sleep(RETRY_PAUSE_S)
        raise EtcdUnavailable(f"etcd can't be read: {problem}")

    async def _write(self, method: str, request: object, *, service: str = "kv") -> Any:
        deadline = time.monotonic() + self.timeout_s
        member = await self._connected(deadline)
        call = getattr(getattr(member, service), method)
        try:
            return await call(request, timeout=max(deadline - time.monotonic(), 0.1), metadata=METADATA)
        except rpc.AioRpcError as error:
            details = error.details() or ""
            if error.code() is rpc.StatusCode.RESOURCE_EXHAUSTED:
                raise EtcdUnavailable(f"{member.endpoint}: {details}") from error
            if error.code() not in _MOVE_ON:
                raise _refused(error) from error
            self.members.failed(member)
            if details in _NOT_APPLIED:
                raise EtcdUnavailable(f"{member.endpoint}: {details}") from error
            raise EtcdOutcomeUnknown(f"{member.endpoint}: {details}") from error

    async def _connected(self, deadline: float) -> Member:
        """A member with a standing connection; EtcdUnavailable when there is none before `deadline`."""
        problem = "no time was given"
        tries = 0
        while (left_s := deadline - time.monotonic()) > 0:
            member = self.members.current()
            try:
                await member.ready(min(left_s, CONNECT_S))
                return member
            except NotConnected as error:
                problem = str(error)
            self.members.failed(member)
            tries += 1
            if tries % len(self.members) == 0:
                await asyncio.sleep(RETRY_PAUSE_S)
        raise EtcdUnavailable(f"etcd can't be written: {problem}")

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Between our types and gRPC's

    def full(self, key: str) -> bytes:
        """The key as etcd knows it."""
        return (self._prefix + key).encode()

    def key_value(self, kv: Any) -> KeyValue:
        """A KeyValue of ours from one of gRPC's."""
        key = kv.key.decode()[len(self._prefix) :]
        return KeyValue(key, kv.value, int(kv.mod_revision), int(kv.create_revision), int(kv.lease))

    def _compare(self, compare: Compare) -> Any:
        return rpc.Compare(
            key=self.full(compare.key),
            target=_TARGETS[compare.target],
            result=_RESULTS[compare.result],
            **{compare.target: compare.value},
        )

    def _op(self, op: Op) -> Any:
        key = self.full(op.key)
        if isinstance(op, Put):
            return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=op.value, lease=op.lease))
        end = prefix_end(key) if op.prefix else b""
        if isinstance(op, Delete):
            return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key, range_end=end))
        return rpc.RequestOp(request_range=rpc.RangeRequest(key=key, range_end=end))


def prefix_end(key: bytes) -> bytes:
    """The first key after all that begin with `key`."""
    stem = key.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


def _refused(error: Any) -> EtcdRefused:
    details = error.details() or ""
    kind = LeaseNotFound if "lease not found" in details else EtcdRefused
    return kind(f"etcd refused a request: {details} ({error.code().name})")
