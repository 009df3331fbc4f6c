"""Takes many keys from four key services while they are killed and frozen and etcd's members restart, and looks for doubles.

    python -m loadtest.keys --count 5000000 [--seed 1]

Prints one JSON object at the end; exit code 1 when a key came twice, keys lean to some slots, or etcd holds more records
than it should. It goes on until the keys are there, every kind of fault has happened in so many rounds, and a block of a dead
or frozen replica was taken over.

The check keeps eight bytes a key (64-bit hashes, of a secret of this process): 40 MB for five million, and a false alarm
about once in a million such runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.local.ports import free_port
from loadtest.processes import Child, EtcdMembers, keygen, running, until_answers, write_settings
from oncepay.etcd import Etcd
from oncepay.keys import SLOTS, slot
from oncepay.settings import Settings

REPLICAS = 4
CLIENTS_A_REPLICA = 2
COUNTS = (1, 10, 100, 1_000)
BLOCK_KEYS = 100_000
"""So few that a block is used up every few seconds, and those of the dead are wanted."""
AHEAD_S = 2
KINDS = 6
ANSWER_S = 60.0
"""Longer than any freeze: what a frozen replica answers when it wakes up counts."""
AGAIN_S = 0.05
LOOK_S = 0.5
PAUSE_S = 1.0
FREEZE_S = 1.5
LONG_FREEZE_S = 10.0
"""Longer than a replica's lease, so that others take its blocks over meanwhile."""
AWAY_S = 1.0
BINS = 256
SPREAD_KEYS = 1 << 20
CHI_SQUARED_MOST = 345.0
"""With 255 degrees of freedom one run in some 7,000 lies above without any fault."""
RECORDS_MOST = 60
"""16 used-up blocks that stay, and those that are not deleted yet; blocks in use, free and of the dead; names and secrets."""
PARTITIONS = 256


class Keys(msgspec.Struct):
    """An answer of the key service."""

    keys: list[str]


class Seen:
    """Every key that was issued, as eight bytes, and how the first million are spread over the slots."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self.bins = [0] * BINS

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, keys: list[str]) -> None:
        if len(self) < SPREAD_KEYS:
            for key in keys:
                self.bins[slot(key) * BINS // SLOTS] += 1
        self._hashes.extend(map(hash, keys))

    def doubles(self) -> int:
        """How many keys came more than once; a part of them at a time, so that no large set is needed."""
        parts = [array("q") for _ in range(PARTITIONS)]
        for number in self._hashes:
            parts[number % PARTITIONS].append(number)
        return sum(len(part) - len(set(part)) for part in parts)

    def chi_squared(self) -> float:
        even = sum(self.bins) / BINS
        return sum((count - even) ** 2 / even for count in self.bins)


class Campaign:
    """The replicas, the members, and what happens to them."""

    def __init__(self, replicas: list[tuple[Child, int]], etcd: EtcdMembers, seed: int, rate_per_s: int) -> None:
        self.seen = Seen()
        self.refused: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._replicas = replicas
        self._etcd = etcd
        self._random = random.Random(seed)
        self._pause_a_key_s = REPLICAS * CLIENTS_A_REPLICA / rate_per_s
        self._ended = False

    @property
    def takeovers(self) -> int:
        """How often a replica took a block over from another."""
        logs = [child.log.read_text(encoding="utf-8") for child, _ in self._replicas]
        return sum(len(re.findall("block taken over", log)) for log in logs)

    async def run(self, count: int, rounds: int, progress: Callable[[int], None]) -> None:
        """Until `count` keys are there, each fault has happened `rounds` times, and a block was taken over."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as session:
            clients = [asyncio.create_task(self._client(session, port)) for _, port in self._replicas * CLIENTS_A_REPLICA]
            trouble = asyncio.create_task(self._trouble(count, rounds))
            try:
                while not (trouble.done() and len(self.seen) >= count and self.takeovers > 0):
                    for task in (await asyncio.wait([*clients, trouble], timeout=LOOK_S))[0]:
                        task.result()
                    progress(len(self.seen))
            finally:
                self._ended = True
                trouble.cancel()
                await asyncio.gather(trouble, return_exceptions=True)
            await asyncio.gather(*clients)

    async def _client(self, session: aiohttp.ClientSession, port: int) -> None:
        decode = msgspec.json.Decoder(Keys).decode
        while not self._ended:
            count = self._random.choice(COUNTS)
            await asyncio.sleep(count * self._pause_a_key_s)
            try:
                async with session.post(f"http://127.0.0.1:{port}/v1/keys", json={"count": count}) as answer:
                    body = await answer.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                self.refused[type(error).__name__] += 1
                await asyncio.sleep(AGAIN_S)
                continue
            if answer.status == 201:
                self.seen.add(decode(body).keys)
            else:
                self.refused[str(answer.status)] += 1
                await asyncio.sleep(AGAIN_S)

    # Faults

    async def _trouble(self, count: int, rounds: int) -> None:
        """Rounds of every kind, at least `rounds`, and until `count` keys are there.

        etcd rests during the long freeze: a new leader of etcd's gives every lease its whole time again, so that trouble
        every few seconds would keep the leases of the dead alive.
        """
        done = 0
        while done < rounds or len(self.seen) < count:
            await asyncio.gather(
                self._one_by_one([self._restart_member, self._freeze_member, self._take_etcd_away]),
                self._one_by_one([self._kill_replica, self._freeze_replica]),
            )
            await self._one_by_one([self._freeze_long])
            done += 1

    async def _one_by_one(self, kinds: list[Callable[[], Awaitable[None]]]) -> None:
        """Each kind once, in any order."""
        for kind in self._random.sample(kinds, len(kinds)):
            await asyncio.sleep(self._random.uniform(0.1, PAUSE_S))
            await kind()
            self.faults[kind.__name__.lstrip("_")] += 1

    async def _kill_replica(self) -> None:
        child, port = self._random.choice(self._replicas)
        child.kill()
        await asyncio.sleep(self._random.uniform(0, PAUSE_S))
        child.start()
        await asyncio.to_thread(until_answers, f"http://127.0.0.1:{port}/livez")

    async def _freeze_replica(self) -> None:
        await self._frozen(self._random.choice(self._replicas)[0], self._random.uniform(0.1, FREEZE_S))

    async def _freeze_long(self) -> None:
        await self._frozen(self._random.choice(self._replicas)[0], LONG_FREEZE_S)

    async def _restart_member(self) -> None:
        await self._restarted([self._random.choice(self._etcd.members)])

    async def _take_etcd_away(self) -> None:
        await self._restarted(self._etcd.members)

    async def _freeze_member(self) -> None:
        await self._frozen(self._random.choice(self._etcd.members), FREEZE_S)

    async def _restarted(self, members: list[Child]) -> None:
        for member in members:
            member.kill()
        await asyncio.sleep(self._random.uniform(0.1, AWAY_S))
        for member in members:
            member.start()
        await asyncio.to_thread(self._etcd.wait_healthy)

    async def _frozen(self, child: Child, seconds: float) -> None:
        child.freeze()
        try:
            await asyncio.sleep(seconds)
        finally:
            child.thaw()


async def campaign(count: int, rounds: int, rate_per_s: int, seed: int, progress: Callable[[int], None]) -> dict[str, Any]:
    """Run it; what came of it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtest-keys-")))
        etcd = stack.enter_context(EtcdMembers(folder))
        config = write_settings(folder / "oncepay.toml", Settings(etcd=etcd.settings, auth=False))
        options = ("--block-keys", str(BLOCK_KEYS), "--ahead-s", str(AHEAD_S))
        replicas = []
        for number in range(1, REPLICAS + 1):
            port = free_port()
            child = keygen(folder, config, f"keygen-{number}", port, *options)
            replicas.append((stack.enter_context(running(child)), port))
        for _, port in replicas:
            await asyncio.to_thread(until_answers, f"http://127.0.0.1:{port}/readyz")
        run = Campaign(replicas, etcd, seed, rate_per_s)
        began = time.monotonic()
        await run.run(count, rounds, progress)
        seconds = time.monotonic() - began
        async with Etcd(etcd.settings) as client:
            records = await client.count("keys/")
        taken_over = run.takeovers
    doubles, chi_squared = run.seen.doubles(), run.seen.chi_squared()
    return {
        "ok": doubles == 0 and records <= RECORDS_MOST and chi_squared <= CHI_SQUARED_MOST,
        "keys": len(run.seen),
        "doubles": doubles,
        "seconds": round(seconds, 1),
        "keys_per_s": round(len(run.seen) / seconds),
        "faults": dict(sorted(run.faults.items())),
        "takeovers": taken_over,
        "refused": dict(sorted(run.refused.items())),
        "etcd_records": records,
        "chi_squared": round(chi_squared, 1),
        "seed": seed,
    }


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=5_000_000, help="how many keys at least (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all kinds of faults, at least (default: %(default)s)")
    parser.add_argument("--rate", type=int, default=80_000, help="keys a second that are asked for (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults' order and times (default: %(default)s)")
    options = parser.parse_args()
    columns = (TextColumn("keys"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("keys", total=options.count)
        run = campaign(options.count, options.rounds, options.rate, options.seed, lambda done: bar.update(task, completed=done))
        found = uvloop.run(run)
    print(json.dumps(found, indent=2))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
