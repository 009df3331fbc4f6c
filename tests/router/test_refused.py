"""What is refused before any other part is asked: the whole router, whose etcd is nowhere."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web

from oncepay.service import Service, listen
from oncepay.settings import EtcdSettings, Settings, StripeSettings, TipaltiSettings
from router.app import start
from router.notifications import BODY_BYTES_MAX, VERIFYING_MAX

NOWHERE = EtcdSettings(endpoints=("127.0.0.1:1",))
NOTIFICATION = b'{"id": "ipn_1", "type": "completed", "eventData": {"refCode": "p-1"}}'


@asynccontextmanager
async def router(settings: Settings) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a router that runs in this process."""
    service = Service(settings, kind="router", name="router-1")
    sock = listen("127.0.0.1", 0, shared=False)
    ended = asyncio.create_task(service.serve(start, [sock], drain_s=0))
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{sock.getsockname()[1]}") as client:
            async with asyncio.timeout(10):
                while True:
                    try:
                        async with client.get("/livez"):
                            break
                    except aiohttp.ClientConnectionError:
                        await asyncio.sleep(0.01)
            yield client
    finally:
        service.stopping.set()
        assert await ended == 0


async def statuses(client: aiohttp.ClientSession, paths: Sequence[str]) -> dict[str, int]:
    """The answers' statuses, by path."""
    found = {}
    for path in paths:
        async with client.get(path) as answer:
            found[path] = answer.status
    return found


async def test_limits_that_are_none() -> None:
    none = ("000000100999999", "000000100" + "9" * 5_000, "9" * 5_000, "0" * 9 + "5", "0", "101", "-1", "+1", "1e1", "\u0663", "")
    paths = [f"/v1/{kind}?limit={limit}" for kind in ("payments", "disputes") for limit in none]
    async with router(Settings(etcd=NOWHERE, auth=False)) as client:
        assert await statuses(client, paths) == dict.fromkeys(paths, 422)


class Verifier:
    """Where Tipalti verifies: it holds back its answer, which is that it sent nothing, until `release` is set."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.release = asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[TipaltiSettings]:
        app = web.Application()
        app.router.add_post("/verify", self._verify)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        try:
            await web.SockSite(runner, sock := listen("127.0.0.1", 0, shared=False)).start()
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            yield TipaltiSettings(base_url=url, verify_url=f"{url}/verify")
        finally:
            await runner.cleanup()

    async def _verify(self, request: web.Request) -> web.Response:
        self.asked.append(await request.read())
        await self.release.wait()
        return web.Response(text="INVALID")


async def notify(client: aiohttp.ClientSession, body: bytes) -> tuple[int, str, Mapping[str, str]]:
    """The answer to a notification: status, problem, headers."""
    async with client.post("/v1/webhooks/tipalti", data=body) as answer:
        return answer.status, (await answer.json(content_type=None))["type"].rpartition("/")[2], answer.headers


async def test_notifications_that_nobody_needs_to_verify() -> None:
    verifier = Verifier()
    verifier.release.set()
    too_long = NOTIFICATION[:-1] + b" " * BODY_BYTES_MAX + b"}"
    async with verifier.serving() as tipalti, router(Settings(etcd=NOWHERE, auth=False, tipalti=tipalti)) as client:
        assert (await notify(client, too_long))[:2] == (413, "body-too-large")
        for body in (b"", b"nonsense", b"[]", b'{"id": 1}', b'{"id": "\xff"}', b'{"more": ' + b"[" * 30_000):
            assert (await notify(client, body))[:2] == (400, "malformed-body")
        assert verifier.asked == []
        assert (await notify(client, NOTIFICATION))[:2] == (400, "bad-signature")
        assert verifier.asked == [NOTIFICATION]


async def test_few_notifications_wait_to_be_verified() -> None:
    verifier = Verifier()
    async with verifier.serving() as tipalti, router(Settings(etcd=NOWHERE, auth=False, tipalti=tipalti)) as client:
        sent = [asyncio.create_task(notify(client, NOTIFICATION)) for _ in range(VERIFYING_MAX + 3)]
        answered = asyncio.as_completed(sent)
        async with asyncio.timeout(10):
            refused = [await next(answered) for _ in range(3)]
        assert {(status, problem, headers["Retry-After"]) for status, problem, headers in refused} == {(503, "too-busy", "1")}
        verifier.release.set()
        answers = await asyncio.gather(*sent)
        assert Counter(status for status, _, _ in answers) == {503: 3, 400: VERIFYING_MAX}
        assert len(verifier.asked) == VERIFYING_MAX
        assert (await notify(client, NOTIFICATION))[0] == 400


@pytest.fixture
def secret(tmp_path: Path) -> tuple[str]:
    file = tmp_path / "secret"
    file.write_text("whsec_1")
    return (str(file),)


async def post(client: aiohttp.ClientSession, path: str, name: str, value: bytes) -> tuple[int, str]:
    """Post NOTIFICATION under a header of any bytes; the answer's status and problem."""
    assert client._base_url
    reader, writer = await asyncio.open_connection("127.0.0.1", client._base_url.port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(NOTIFICATION)}\r\n{name}: ".encode()
    writer.write(head + value + b"\r\n\r\n" + NOTIFICATION)
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert length
        body = msgspec.json.decode(await reader.readexactly(int(length[1])))
    writer.close()
    return body["status"], body["type"].rpartition("/")[2]


@pytest.mark.parametrize("made", ["t={now},v1=é", "t={now},v1=\udcff", "t={digits},v1=a", "t=٣,v1=a", "é"])
async def test_signatures_of_stripe_that_can_t_be(secret: tuple[str], made: str) -> None:
    value = made.format(now=int(time.time()), digits="1" * 5_000).encode("utf-8", "surrogateescape")
    async with router(Settings(etcd=NOWHERE, auth=False, stripe=StripeSettings(webhook_secret_files=secret))) as client:
        assert await post(client, "/v1/webhooks/stripe", "Stripe-Signature", value) == (400, "bad-signature")


@pytest.mark.parametrize("made", ["{now},é", "{now},\udcff", "{digits},a", "1" * 400 + ",a", "٣,a", "é"])
async def test_signatures_of_tipalti_that_can_t_be(secret: tuple[str], made: str) -> None:
    value = made.format(now=int(time.time()), digits="1" * 5_000).encode("utf-8", "surrogateescape")
    tipalti = TipaltiSettings(base_url="http://127.0.0.1:1", notification_secret_files=secret)
    async with router(Settings(etcd=NOWHERE, auth=False, tipalti=tipalti)) as client:
        assert await post(client, "/v1/webhooks/tipalti", "tipalti-signature", value) == (400, "bad-signature")
