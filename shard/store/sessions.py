"""Sessions with Postgres end when the network has lost them, and not by a time-out: a commit in flight is never cut off."""

from __future__ import annotations

import contextlib
import socket

import asyncpg

IDLE_S, INTERVAL_S, PROBES = 10, 3, 3
"""Keepalive probes: a session that nobody answers any more ends after some 20 s."""
UNACKNOWLEDGED_MS = 20_000
"""What was sent and no kernel has acknowledged ends it as well (tcp(7), TCP_USER_TIMEOUT). A commit that waits for standbys is
acknowledged meanwhile: its node's kernel answers, also while Postgres stands still."""

_OPTIONS = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", IDLE_S),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", INTERVAL_S),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", PROBES),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", UNACKNOWLEDGED_MS),
)


def watched(session: asyncpg.Connection) -> asyncpg.Connection:
    """The session, with the options set. asyncpg takes none (its settings are the server's), so its socket is asked for."""
    sock = session._transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        for level, name, value in _OPTIONS:
            with contextlib.suppress(OSError, AttributeError):  # not every system has all of them
                sock.setsockopt(level, getattr(socket, name), value)
    return session
