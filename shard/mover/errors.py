"""What can go wrong with a move. The message says what to do."""

from __future__ import annotations

from oncepay.errors import OncepayError, Unavailable


class MoveError(OncepayError):
    """The move can't go on."""

    slug = "move"


class NoSuchMove(MoveError):
    """There is no such move."""

    slug = "no-such-move"


class MoveRefused(MoveError):
    """The move's state doesn't allow this."""

    slug = "move-refused"


class MoveTaken(MoveError):
    """Another operator process has the move."""

    slug = "move-taken"


class MovePaused(MoveError):
    """The move was paused; `oncepay reshard resume` carries it on."""

    slug = "move-paused"


class MoveStopped(MoveError):
    """The move stands still and an operator has to look."""

    slug = "move-stopped"


class BeingRebuilt(MoveError):
    """What the aggregator derives of the giving shard is being rebuilt. Nothing has changed; come again afterwards."""

    slug = "being-rebuilt"


class PauseTooLong(MoveError):
    """The pause would have been longer than its limit, so the range went back; run the same command again later."""

    slug = "pause-too-long"


class RangeBusy(Unavailable):
    """The range's lock was not free in time."""

    slug = "range-busy"


class NotDrained(Unavailable):
    """The stream has not been replayed up to the drain position."""

    slug = "not-drained"


class StreamLost(Unavailable):
    """The stream's slot is gone or has lost its log."""

    slug = "stream-lost"
