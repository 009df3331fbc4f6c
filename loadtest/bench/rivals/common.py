"""What the rivals share: a socket for several processes, and where the database is."""

from __future__ import annotations

import argparse
import os
import socket

DSN_ENV = "RIVAL_DSN"


def arguments(description: str | None) -> argparse.Namespace:
    """`--port`; the database's DSN is in the environment, for it holds a password."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--port", type=int, required=True)
    return parser.parse_args()


def dsn() -> str:
    return os.environ[DSN_ENV]


def listen(port: int) -> socket.socket:
    """A socket on a port that several processes share."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock
