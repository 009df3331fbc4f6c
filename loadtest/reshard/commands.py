"""`oncepay` as an operator has it: commands in processes of their own, which a campaign freezes and kills."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from oncepay.settings import load

FREEZE_AT = "ONCEPAY_MOVER_FREEZE_AT"
FROZEN_S = 60.0
COMMAND_S = 240.0
"""How long a command of the matrix may take."""


class Failed(Exception):
    """A command ended with an error that isn't part of the test."""


class Operator:
    """One operator's shell for the cluster in `home`."""

    def __init__(self, home: Path, environment: Mapping[str, str] | None = None, *, command_s: float = COMMAND_S) -> None:
        self.home = home
        self._command_s = command_s
        self._environment = {**os.environ, **(environment or {}), "ONCEPAY_HOME": str(home)}

    async def start(self, *arguments: str, freeze_at: str = "") -> asyncio.subprocess.Process:
        """Begin a command; with `freeze_at` it stops itself at that step of the move."""
        environment = {**self._environment, **({FREEZE_AT: freeze_at} if freeze_at else {})}
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cli", *arguments, "--output", "json",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment,
            process_group=0,  # Ctrl-C is for the campaign, which ends when the command has
        )  # fmt: skip

    async def end(self, process: asyncio.subprocess.Process) -> tuple[int, dict[str, Any]]:
        """Its exit code and its object; an empty one when it was killed."""
        async with asyncio.timeout(self._command_s):
            out, err = await process.communicate()
        code = process.returncode if process.returncode is not None else -1
        if code < 0:
            return code, {}
        try:
            answer: dict[str, Any] = json.loads(out)
        except ValueError:
            raise Failed(f"a command ended with {code}: {err.decode(errors='replace')[-2000:]}") from None
        return code, answer

    async def run(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """A command from start to end."""
        return await self.end(await self.start(*arguments))

    async def must(self, *arguments: str) -> dict[str, Any]:
        """A command that has to succeed. Raises Failed."""
        code, answer = await self.run(*arguments)
        if code:
            raise Failed(f"oncepay {' '.join(arguments)} ended with {code}: {answer}")
        return answer


async def frozen(process: asyncio.subprocess.Process) -> bool:
    """Wait until the process has stopped itself; False when it ended instead."""
    async with asyncio.timeout(FROZEN_S):
        while process.returncode is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
                    return True
            await asyncio.sleep(0.01)
    return False


def thaw(process: asyncio.subprocess.Process) -> None:
    """Let it go on."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGCONT)


def kill(pid: int) -> None:
    """SIGKILL, as a crash is."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def leader(operator: Operator, shard: str) -> dict[str, Any]:
    """How a superuser reaches the shard's leader, in asyncpg's words."""
    status = await operator.must("status")
    found = next(item for item in status["shards"] if item["name"] == shard)
    port = next(node["port"] for node in found["nodes"] if node["name"] == found["leader"])
    postgres = load(operator.home / "oncepay.toml").postgres
    return {
        "host": "127.0.0.1", "port": port, "user": postgres.superuser, "password": postgres.superuser_password,
        "database": postgres.database,
    }  # fmt: skip


async def session(operator: Operator, shard: str) -> asyncpg.Connection:
    """A superuser's session with the shard's leader."""
    return await asyncpg.connect(**await leader(operator, shard))
