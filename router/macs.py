"""The secrets by which an issued key is told from an invented one, kept current from etcd."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from oncepay.etcd import Etcd, Mirror
from oncepay.etcd.types import KeyValue
from oncepay.keys import MacSecrets

MAC_KEY = "keys/mac"


class Macs:
    """The record `keys/mac`, watched. While it is unknown no key proves itself, so each is looked up."""

    def __init__(self, etcd: Etcd) -> None:
        self._mirror = Mirror(etcd, MAC_KEY, on_change=self._changed)
        self._secrets: Mapping[int, bytes] = {}

    def start(self) -> None:
        """Begin to watch."""
        self._mirror.start()

    async def stop(self) -> None:
        """End the watch."""
        await self._mirror.stop()

    @property
    def known(self) -> bool:
        """Whether etcd was read: before, no key can be refused for good."""
        return self._mirror.synced

    def secrets(self) -> Mapping[int, bytes]:
        """Secrets by their number."""
        return self._secrets

    def _changed(self, key: str, value: KeyValue | None) -> None:
        if not key and value is not None:
            self._secrets = msgspec.json.decode(value.value, type=MacSecrets).secrets
