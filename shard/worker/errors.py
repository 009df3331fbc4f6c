"""What can go wrong with a shard's worker."""

from __future__ import annotations

from oncepay.errors import OncepayError, Unavailable


class WrongNode(Unavailable):
    """This node can't be followed now; look for the leader again."""

    slug = "wrong-node"


class FeedHalted(OncepayError):
    """The feed stopped and needs an operator."""

    status = 503
    slug = "feed-halted"


class FeedDown(Unavailable):
    """The aggregator takes no batches."""

    slug = "feed-down"


class StandDown(OncepayError):
    """Another worker is the shard's active one."""

    slug = "stand-down"
