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
    """The worker's turn is over: another one is active, or what it knows of the shard has a gap."""

    slug = "stand-down"
