"""The etcd client over TLS, with certificates on both sides."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from oncepay.errors import EtcdUnavailable, SettingsError
from oncepay.etcd import Etcd
from oncepay.settings import EtcdSettings
from tests.certificates import authority, certificate
from tests.etcd_fixture import ETCD, dying_with_parent, free_ports
from tests.needs import needs_program

pytestmark = [pytest.mark.cluster, needs_program("openssl")]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdSettings]:
    folder = tmp_path_factory.mktemp("tls")
    authority(folder, "ca")
    authority(folder, "stranger")
    certificate(folder, "ca", "server")
    certificate(folder, "ca", "client")
    certificate(folder, "stranger", "intruder")
    port, peer = free_ports(2)
    url = f"https://127.0.0.1:{port}"
    command = dying_with_parent(
        *(ETCD, "--data-dir", str(folder / "data"), "--listen-client-urls", url, "--advertise-client-urls", url),
        *("--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"),
        *("--initial-cluster", f"default=http://127.0.0.1:{peer}", "--client-cert-auth", "--log-level", "error"),
        *("--cert-file", str(folder / "server.pem"), "--key-file", str(folder / "server.key")),
        *("--trusted-ca-file", str(folder / "ca.pem")),
    )
    process = subprocess.Popen(command)
    made = EtcdSettings(
        endpoints=(f"127.0.0.1:{port}",),
        ca_file=str(folder / "ca.pem"),
        cert_file=str(folder / "client.pem"),
        key_file=str(folder / "client.key"),
    )

    async def answers() -> None:
        async with Etcd(made, timeout_s=20) as etcd:
            await etcd.get("k")

    try:
        asyncio.run(answers())
        yield made
    finally:
        process.kill()
        process.wait()


async def test_both_sides_know_each_other(settings: EtcdSettings) -> None:
    async with Etcd(settings, timeout_s=20) as etcd:
        await etcd.put("k", b"1")
        kv = await etcd.get("k")
        assert kv is not None
        assert kv.value == b"1"


@pytest.mark.parametrize("what", ["no certificate", "a stranger's certificate", "a stranger's authority", "no TLS"])
async def test_others_stay_out(settings: EtcdSettings, what: str) -> None:
    folder = Path(settings.ca_file).parent
    changes = {
        "no certificate": {"cert_file": "", "key_file": ""},
        "a stranger's certificate": {"cert_file": str(folder / "intruder.pem"), "key_file": str(folder / "intruder.key")},
        "a stranger's authority": {"ca_file": str(folder / "stranger.pem")},
        "no TLS": {"ca_file": "", "cert_file": "", "key_file": ""},
    }[what]
    async with Etcd(msgspec.structs.replace(settings, **changes), timeout_s=2) as etcd:
        with pytest.raises(EtcdUnavailable):
            await etcd.get("k")


async def test_a_file_that_isn_t_there_is_named(settings: EtcdSettings) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.pem"):
        async with Etcd(msgspec.structs.replace(settings, cert_file="/nowhere.pem")):
            pass
