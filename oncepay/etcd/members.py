"""The connections to etcd's members, and which one is in use.

Each endpoint has a channel of its own, so that names are resolved and TLS is checked per member, and so that a member
that froze or was cut off (its TCP connection still stands) is left behind by the first call that misses its deadline,
faster than HTTP/2 pings could say so: etcd refuses pings more often than every 5 s.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

# No fork handlers, and none of gRPC's own lines on standard error: what matters is in the errors raised here.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc  # type: ignore[import-untyped]
from aetcd import rpc

from oncepay.errors import SettingsError
from oncepay.settings import EtcdSettings

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]

# A member without a leader answers at once instead of waiting (reads) or going silent (watches).
METADATA = (("hasleader", "true"),)


class NotConnected(Exception):
    """No connection to the member: nothing was sent."""


class Member:
    """One endpoint: its channel and the stubs on it, made at first use."""

    __slots__ = ("_channel", "_settings", "endpoint", "kv", "lease", "maintenance", "watch")

    def __init__(self, endpoint: str, settings: EtcdSettings) -> None:
        self.endpoint = endpoint
        self._settings = settings
        self._channel: Any = None
        self.kv: Any = None
        self.lease: Any = None
        self.watch: Any = None
        self.maintenance: Any = None

    def open(self) -> None:
        if self._channel is not None:
            return
        credentials = _credentials(self._settings)
        if credentials is None:
            channel = rpc.insecure_channel(self.endpoint, options=_OPTIONS)
        else:
            channel = rpc.secure_channel(self.endpoint, credentials, options=_OPTIONS)
        self._channel = channel
        self.kv = rpc.KVStub(channel)
        self.lease = rpc.LeaseStub(channel)
        self.watch = rpc.WatchStub(channel)
        self.maintenance = rpc.MaintenanceStub(channel)

    async def ready(self, timeout_s: float) -> None:
        """Return when connected; NotConnected when that fails or takes longer than `timeout_s`."""
        self.open()
        ready = grpc.ChannelConnectivity.READY
        state = self._channel.get_state(try_to_connect=True)
        if state is ready:
            return
        refused = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)
        try:
            async with asyncio.timeout(timeout_s):
                while state is not ready:
                    if state in refused:
                        raise NotConnected(f"{self.endpoint} refuses the connection")
                    await self._channel.wait_for_state_change(state)
                    state = self._channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise NotConnected(f"{self.endpoint} can't be connected to in {timeout_s:.1f} s") from None

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()


class Members:
    """All endpoints; one is current, and whoever finds it wanting moves everyone to the next."""

    def __init__(self, settings: EtcdSettings) -> None:
        if not settings.endpoints:
            raise SettingsError("etcd.endpoints is empty")
        self._members = [Member(endpoint, settings) for endpoint in settings.endpoints]
        self._index = random.randrange(len(self._members))

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Any:
        return iter(self._members)

    def current(self) -> Member:
        return self._members[self._index]

    def failed(self, member: Member) -> None:
        """Leave `member`, if it is still the current one."""
        if self._members[self._index] is member:
            self._index = (self._index + 1) % len(self._members)

    async def close(self) -> None:
        for member in self._members:
            await member.close()


def _credentials(settings: EtcdSettings) -> Any:
    """TLS with the deployment's certificates, or None where no file is set. Files are read when a channel is made."""
    if not (settings.ca_file or settings.cert_file):
        return None

    def read(name: str) -> bytes | None:
        if not name:
            return None
        try:
            return Path(name).read_bytes()
        except OSError as error:
            raise SettingsError(f"can't read {name}: {error.strerror}") from error

    return grpc.ssl_channel_credentials(read(settings.ca_file), read(settings.key_file), read(settings.cert_file))
