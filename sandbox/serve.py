"""Running a stand-in as a service: one process, one loop, loopback unless told, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import uvloop
from aiohttp import web

from sandbox.store import StateError

BACKLOG = 2_048

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Service(Protocol):
    """What `run` can run."""

    async def start(self, url: str) -> None:
        """Begin work; `url` is the origin that it is reached at."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""

    async def stop(self) -> None:
        """Finish what is under way and close the state."""


def arguments(name: str, default_port: int) -> argparse.ArgumentParser:
    """The command line that every stand-in has."""
    parser = argparse.ArgumentParser(prog=f"python -m sandbox.{name}", description=f"A stateful stand-in for {name.title()}.")
    parser.add_argument("--port", type=int, default=default_port, help="TCP port; 0 takes a free one and prints it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (loopback by default)")
    parser.add_argument("--state", type=Path, default=None, help="SQLite file that holds the state (memory by default)")
    return parser


def drop(request: web.BaseRequest, *, reset: bool) -> web.StreamResponse:
    """Close the connection without an answer; with `reset` the peer sees a TCP reset instead of an end."""
    transport = request.transport
    if transport is not None:
        if reset:
            sock: socket.socket | None = transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return web.Response()


async def _serve(service: Service, host: str, port: int) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    server = web.Server(service.handle, access_log=None, keepalive_timeout=75.0)
    runner = web.ServerRunner(server, shutdown_timeout=2.0)
    await runner.setup()
    site = web.TCPSite(runner, host, port, backlog=BACKLOG)
    await site.start()
    listening = runner.addresses[0][1]
    url = f"http://{host}:{listening}"
    await service.start(url)
    print(f"listening on {url}", flush=True)
    try:
        await stopped.wait()
    finally:
        await runner.cleanup()
        await service.stop()


def run(make: Callable[[], Service], host: str, port: int) -> None:
    """Serve until told to stop. Exits with 1 and a message when the address or the state file is taken."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)

    async def main() -> None:
        await _serve(make(), host, port)

    try:
        uvloop.run(main())
    except StateError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"can't serve on {host}:{port}: {error.strerror or error}")
