"""The evidence that a commit is on the quorum: a member's physical standby has flushed past it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence

import asyncpg

from oncepay.errors import OutcomeUnknown

EVIDENCE_S = 5.0
"""How long a commit's evidence may take before the outcome is called unknown."""
EVIDENCE_PAUSES_S = (0.0, 0.001, 0.002, 0.005, 0.01)

_EVIDENCE = "select at_lsn, proved from oncepay.evidence($1, $2)"


async def prove(connection: asyncpg.Connection, shard: str, members: Sequence[str]) -> None:
    """Return when a member's physical standby has flushed past what this session has just committed on `shard`.

    `members` are the slots of the shard's members. Raises OutcomeUnknown after EVIDENCE_S.
    """
    since: str | None = None
    deadline_s = time.monotonic() + EVIDENCE_S
    pauses = itertools.chain(EVIDENCE_PAUSES_S, itertools.repeat(0.02))
    while True:
        try:
            row = await connection.fetchrow(_EVIDENCE, members, since)
        except asyncpg.PostgresError as error:  # no refusal: the commit was before
            raise OutcomeUnknown(f"no evidence from {shard}: {error!r}") from error
        if row["proved"]:
            return
        since = row["at_lsn"]
        if time.monotonic() > deadline_s:
            raise OutcomeUnknown(f"no standby of {shard} has confirmed {since}")
        await asyncio.sleep(next(pauses))
