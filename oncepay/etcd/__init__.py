"""A small typed asyncio client of etcd's v3 API: several endpoints, deadlines, TLS, leases, watches that resume, mirrors.

    async with Etcd(settings.etcd) as etcd:
        revision = await etcd.put("map", b"...")
        kv = await etcd.get("map")

Keys are str, relative to the deployment's prefix; values are bytes. Errors: EtcdUnavailable (it did not happen, or nothing
could be read), EtcdOutcomeUnknown (a write that may or may not have taken effect: read it back), EtcdRefused (etcd said no).
"""

from oncepay.etcd.client import Etcd
from oncepay.etcd.errors import EtcdOutcomeUnknown, EtcdRefused, LeaseNotFound
from oncepay.etcd.lease import Lease
from oncepay.etcd.mirror import Mirror
from oncepay.etcd.types import (
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Put,
    Resync,
    TxnResult,
    absent,
    mod_revision_is,
    present,
    value_is,
)
from oncepay.etcd.watch import Watch

__all__ = [
    "Compare",
    "Delete",
    "Etcd",
    "EtcdOutcomeUnknown",
    "EtcdRefused",
    "Event",
    "Get",
    "KeyValue",
    "Lease",
    "LeaseNotFound",
    "Mirror",
    "Put",
    "Resync",
    "TxnResult",
    "Watch",
    "absent",
    "mod_revision_is",
    "present",
    "value_is",
]
