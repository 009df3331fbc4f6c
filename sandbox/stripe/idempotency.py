"""Idempotency keys as Stripe handles them: the first answer is kept for 24 hours and replayed, whatever it was.

What is kept: answers of calls whose execution had begun, 402s and 500s included. What isn't: validation failures,
conflicts and 429s. An object's answer is kept as its packed snapshot, everything else as JSON.
"""

from __future__ import annotations

import hashlib
import sqlite3
from typing import NamedTuple

from sandbox.stripe import errors
from sandbox.stripe.world import World

KEY_LENGTH_MAX = 255
RETENTION_S = 24 * 3_600
CACHE_MAX = 20_000
CACHE_SURPLUS = 2_000
JSON_KIND = ""
"""The `kind` of an answer that is kept as JSON."""


class Answer(NamedTuple):
    """A kept answer: `data` is JSON when `kind` is empty, else a packed object of that kind."""

    created: int
    fingerprint: bytes
    status: int
    kind: str
    data: bytes


def fingerprint(endpoint_path: str, pairs: list[tuple[str, str]]) -> bytes:
    """A hash of which call this is, with what parameters (in any order)."""
    digest = hashlib.blake2b(endpoint_path.encode(), digest_size=16)
    for name, value in sorted(pairs):
        digest.update(f"\0{name}\0{value}".encode())
    return digest.digest()


class Idempotency:
    """The kept answers of the account."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._running: set[int] = set()
        self._cache: dict[int, Answer] = {}
        self._pending: list[tuple[int, int, Answer]] = []
        newest = world.store.connection.execute("SELECT max(ord) FROM idempotency").fetchone()[0]
        self._next = (newest or 0) + 1
        world.clock.on_advance(self.prune)

    def begin(self, api_key: str, key: str, mark: bytes) -> int | Answer:
        """Enter a call with an idempotency key: the kept answer, or a ticket for `keep` or `release`.

        Raises 400 idempotency_error when the key was used for another call, 409 when its first call is running.
        """
        if len(key) > KEY_LENGTH_MAX:
            raise errors.StripeError(400, "idempotency_error", f"Idempotency keys can have up to {KEY_LENGTH_MAX} characters.")
        digest = hashlib.blake2b(f"{api_key}\0{key}".encode(), digest_size=8).digest()
        ticket = int.from_bytes(digest, "big", signed=True)
        if ticket in self._running:
            raise errors.StripeError(
                409,
                "idempotency_error",
                f"There is currently another in-progress request using this Idempotent Key ({key}). Please try again later.",
                code="idempotency_key_in_use",
            )
        kept = self._find(ticket)
        if kept is None:
            self._running.add(ticket)
            return ticket
        if kept.fingerprint != mark:
            raise errors.StripeError(
                400,
                "idempotency_error",
                "Keys for idempotent requests can only be used with the same parameters they were first used with. "
                f"Try using a key other than '{key}' if you meant to execute a different request.",
            )
        return kept

    def _find(self, ticket: int) -> Answer | None:
        kept = self._cache.get(ticket)
        if kept is None:
            row = self._world.store.connection.execute(
                "SELECT created, fingerprint, status, kind, data FROM idempotency WHERE hash = ? ORDER BY ord DESC LIMIT 1",
                (ticket,),
            ).fetchone()
            if row is None:
                return None
            kept = Answer(*row)
        if kept.created <= self._world.clock.now() - RETENTION_S:
            return None
        return kept

    def keep(self, ticket: int, answer: Answer) -> None:
        """The call was executed: replay `answer` from now on."""
        self._running.discard(ticket)
        self._cache[ticket] = answer
        self._pending.append((self._next, ticket, answer))
        self._next += 1
        self._world.store.touch(self)

    def release(self, ticket: int) -> None:
        """The call came to nothing that is kept."""
        self._running.discard(ticket)

    def write(self, connection: sqlite3.Connection) -> None:
        """Write the new answers; see `store.Writes`."""
        connection.executemany(
            "INSERT INTO idempotency (ord, hash, created, fingerprint, status, kind, data) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(ordinal, ticket, *answer) for ordinal, ticket, answer in self._pending],
        )
        self._pending.clear()
        surplus = len(self._cache) - CACHE_MAX
        if surplus > CACHE_SURPLUS:
            for ticket in list(self._cache)[:surplus]:
                del self._cache[ticket]

    def prune(self) -> None:
        """Delete what is older than 24 hours of the clock."""
        self._cache.clear()
        self._world.store.query("DELETE FROM idempotency WHERE created <= ?", (int(self._world.clock.now()) - RETENTION_S,))
