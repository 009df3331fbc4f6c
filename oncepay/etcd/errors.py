"""What can go wrong with etcd beside EtcdUnavailable."""

from __future__ import annotations

from oncepay.errors import EtcdUnavailable, OncepayError


class EtcdOutcomeUnknown(EtcdUnavailable):
    """Whether the write to etcd took effect is not known; read it back."""

    slug = "etcd-outcome-unknown"


class EtcdRefused(OncepayError):
    """etcd refused a request."""

    slug = "etcd-refused"


class LeaseNotFound(EtcdRefused):
    """The lease in etcd is gone."""

    slug = "etcd-lease-not-found"
