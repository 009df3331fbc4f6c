"""What can be wrong with a local cluster. The message is what a person sees."""

from __future__ import annotations

from oncepay.errors import OncepayError


class ClusterError(OncepayError):
    """The local cluster can't do this."""

    slug = "local-cluster"


class AlreadyRunning(ClusterError):
    """A cluster is already running here."""

    slug = "local-cluster-running"


class NotRunning(ClusterError):
    """No cluster is running here."""

    slug = "local-cluster-not-running"


class RestoreUndone(ClusterError):
    """A restore of etcd was begun here and is not over."""

    slug = "local-cluster-restore-undone"


class PortTaken(ClusterError):
    """A port that the cluster needs is taken."""

    slug = "local-cluster-port-taken"


class PartFailed(ClusterError):
    """A part of the cluster didn't come up."""

    slug = "local-cluster-part-failed"


class WrongHome(ClusterError):
    """The folder doesn't fit what is asked for."""

    slug = "local-cluster-home"
