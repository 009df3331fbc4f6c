"""A copy's sessions: none stays behind, however it ends."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from oncepay.errors import ShardUnavailable
from shard.mover.copy import Copied, Copier


class Session:
    """One that may be ended."""

    def __init__(self) -> None:
        self.ended = False

    def terminate(self) -> None:
        self.ended = True


class OneSide:
    """A shard that opens its one session, or none."""

    def __init__(self, session: Session | None) -> None:
        self._session = session
        self.own_errors = nullcontext

    async def open(self) -> Session:
        if self._session is None:
            raise ShardUnavailable("no node can be reached")
        return self._session

    async def one(self, *_: object) -> dict[str, int | None]:
        return {"copied_to": None, "copied_rows": 0, "copied_bytes": 0}


async def test_a_taker_that_can_not_be_reached_leaves_no_session_at_the_giver() -> None:
    """The step is begun again each second while a shard is away."""
    session = Session()
    copier = Copier(
        "m1", 1, OneSide(session), OneSide(None), 0, 9, (),  # type: ignore[arg-type]
        rows_total=10, limit_rows_per_s=0, lag_max_bytes=1,
    )  # fmt: skip

    async def on_chunk(_: Copied) -> None:
        raise AssertionError

    with pytest.raises(ShardUnavailable):
        await copier.run(on_chunk)
    assert session.ended
