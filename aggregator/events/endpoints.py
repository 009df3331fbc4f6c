"""Endpoints: where events are sent. Small records in etcd, mirrored by every aggregator."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import msgspec

from aggregator.events.signing import new_secret
from oncepay.errors import NotFound, TooBusy, WrongState
from oncepay.etcd import Etcd, KeyValue, Mirror
from oncepay.logs import get_logger

PREFIX = "events/endpoints/"
ENDPOINTS_MAX = 50
ROLLED_S = 24 * 3600
"""How long the secret before is still signed with, after a new one was made."""

_log = get_logger("events")


class Secret(msgspec.Struct, frozen=True):
    """A signing secret, and until when it is used (milliseconds since 1970; 0: for good)."""

    value: str
    until_ms: int = 0


class Endpoint(msgspec.Struct, frozen=True):
    """One endpoint. No `types` are all types; `payment.*` are those that begin with `payment.`."""

    id: str
    url: str
    secrets: tuple[Secret, ...]
    types: tuple[str, ...] = ()
    description: str = ""
    enabled: bool = True
    created_at_ms: int = 0
    reason: str = ""

    def wants(self, type_: str) -> bool:
        """Whether events of that type are sent there."""
        return not self.types or any(
            type_ == wanted or (wanted.endswith(".*") and type_.startswith(wanted[:-1])) for wanted in self.types
        )

    def current_secrets(self, now_ms: int) -> list[str]:
        """Those that sign now, the newest first."""
        return [secret.value for secret in self.secrets if not secret.until_ms or secret.until_ms > now_ms]


class Endpoints:
    """The records. `recording` says whether events have to be kept."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self._mirror = Mirror(etcd, PREFIX, on_change=self._changed)
        self._known: dict[str, Endpoint] = {}
        self._listeners: list[Callable[[], None]] = []

    def start(self) -> None:
        """Begin to watch."""
        self._mirror.start()

    async def stop(self) -> None:
        """End."""
        await self._mirror.stop()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after a record changed."""
        self._listeners.append(listener)

    def _changed(self, name: str, kv: KeyValue | None) -> None:
        self._known.pop(name, None)
        if kv is not None:
            try:
                self._known[name] = msgspec.json.decode(kv.value, type=Endpoint)
            except msgspec.DecodeError as error:
                _log.error("endpoint record can't be read", record=name, reason=str(error))
        for listener in self._listeners:
            listener()

    def recording(self) -> bool:
        """Whether anybody may want to hear: also while the records couldn't be read yet."""
        return bool(self._known) or not self._mirror.synced

    def all(self) -> list[Endpoint]:
        """As known here, oldest first."""
        return sorted(self._known.values(), key=lambda endpoint: (endpoint.created_at_ms, endpoint.id))

    def find(self, name: str) -> Endpoint | None:
        """As known here."""
        return self._known.get(name)

    async def read(self, name: str) -> tuple[Endpoint, int]:
        """The record as etcd has it, and its revision. Raises NotFound."""
        kv = await self._etcd.get(PREFIX + name)
        if kv is None:
            raise NotFound(f"there is no event endpoint {name}")
        return msgspec.json.decode(kv.value, type=Endpoint), kv.mod_revision

    async def add(self, made: Endpoint) -> None:
        """Put a new endpoint: from now on it is sent to. Raises TooBusy when there are ENDPOINTS_MAX."""
        if await self._etcd.count(PREFIX) >= ENDPOINTS_MAX:
            raise TooBusy(f"a deployment has at most {ENDPOINTS_MAX} event endpoints")
        revision = await self._etcd.put(PREFIX + made.id, msgspec.json.encode(made))
        await self._mirror.wait_revision(revision, 5.0)

    async def change(self, name: str, changed: Callable[[Endpoint], Endpoint]) -> Endpoint:
        """Change a record by compare-and-put. Raises NotFound, or WrongState when others change it all the time."""
        for _ in range(5):
            before, revision = await self.read(name)
            after = changed(before)
            if after == before:
                return after
            put = await self._etcd.compare_and_put(PREFIX + name, msgspec.json.encode(after), revision)
            if put is not None:
                await self._mirror.wait_revision(put, 5.0)
                return after
        raise WrongState(f"{name} is being changed by others")

    async def remove(self, name: str) -> None:
        """Raises NotFound."""
        if not await self._etcd.delete(PREFIX + name):
            raise NotFound(f"there is no event endpoint {name}")


def new_endpoint(url: str, types: tuple[str, ...], description: str) -> Endpoint:
    """With an id and a secret of its own; nobody knows of it yet."""
    return Endpoint(f"we_{secrets.token_hex(12)}", url, (Secret(new_secret()),), types, description, True, _now_ms())


def rolled(endpoint: Endpoint) -> Endpoint:
    """With a new secret; the one before signs for another day."""
    until_ms = _now_ms() + ROLLED_S * 1000
    old = tuple(msgspec.structs.replace(each, until_ms=each.until_ms or until_ms) for each in endpoint.secrets[:1])
    return msgspec.structs.replace(endpoint, secrets=(Secret(new_secret()), *old))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
