"""Requests to Stripe over TLS: only to the host whose certificate its authority has signed."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from oncepay.wire import Wire
from tests.certificates import authority, certificate
from tests.needs import needs_program
from tests.oncepay.test_wire import Host, echo, get

pytestmark = needs_program("openssl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tls")
    authority(made, "ca")
    authority(made, "stranger")
    certificate(made, "ca", "server")
    certificate(made, "ca", "other", of="DNS:elsewhere.example")
    return made


@pytest.fixture
async def port(folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[int]:
    """Of a host that shows the certificate which the test names."""
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    name = getattr(request, "param", "server")
    shown.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    server = await asyncio.start_server(Host(echo).serve, "127.0.0.1", 0, ssl=shown)
    yield server.sockets[0].getsockname()[1]
    server.close()


def wire(port: int, folder: Path, ca: str) -> Wire:
    trusted = ssl.create_default_context(cafile=folder / f"{ca}.pem")
    return Wire("127.0.0.1", port, secure=trusted, timeout_s=5.0)


async def test_answers_come_over_tls_on_a_kept_connection(port: int, folder: Path) -> None:
    made = wire(port, folder, "ca")
    answers = [await made.ask(get(f"/{number}-0")) for number in range(3)]
    assert [answer.body for answer in answers] == [b"/0-0", b"/1-0", b"/2-0"]
    assert len(made._kept) == 1
    await made.close()


async def test_a_host_signed_by_a_stranger_gets_no_request(port: int, folder: Path) -> None:
    made = wire(port, folder, "stranger")
    with pytest.raises(OSError, match="certificate verify failed"):
        await made.ask(get("/secret-0"))
    await made.close()


@pytest.mark.parametrize("port", ["other"], indirect=True)
async def test_a_certificate_of_another_host_is_refused(port: int, folder: Path) -> None:
    made = wire(port, folder, "ca")
    with pytest.raises(OSError, match="IP address mismatch"):
        await made.ask(get("/secret-0"))
    await made.close()
