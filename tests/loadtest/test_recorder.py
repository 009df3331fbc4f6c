"""The buyers that remember: each lie of a platform is named. The platform here is a few lines that lie on purpose."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtest.recorder import Recorder

Handler = Callable[[web.Request], Awaitable[web.Response]]
EVERYWHERE = [[0, 65_535]]


class Platform:
    """Settles each payment at once, as version 3; tests make it lie."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, object]] = {}
        self.refusals: list[web.Response] = []

    async def submit(self, request: web.Request) -> web.Response:
        if self.refusals:
            return self.refusals.pop()
        key = request.headers["Idempotency-Key"]
        row = {"key": key, "status": "succeeded", "version": 3, "amount_captured": 1250, "payment_intent": f"pi_{key}"}
        return web.json_response(self.rows.setdefault(key, row))

    async def show(self, request: web.Request) -> web.Response:
        row = self.rows.get(request.match_info["key"])
        return web.json_response(row) if row else web.json_response({}, status=404)

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.post("/v1/payments", self.submit), web.get("/v1/payments/{key}", self.show)])
        return app


Lie = Callable[[Platform, Recorder], None]


async def violations(lie: Lie, refusals: list[web.Response] | None = None) -> tuple[list[str], Recorder]:
    """What the recorder finds when the platform lies before the last look."""
    platform = Platform()
    platform.refusals = refusals or []
    async with TestServer(platform.app()) as server:
        async with Recorder(str(server.make_url("")).rstrip("/"), "key", EVERYWHERE, buyers=2) as recorder:
            await recorder.more(6)
            await recorder.stop()
            lie(platform, recorder)
            return await recorder.check(), recorder


def some(recorder: Recorder) -> str:
    return next(iter(recorder.told))


async def test_an_honest_platform_violates_nothing() -> None:
    found, recorder = await violations(lambda _platform, _recorder: None)
    assert found == []
    assert recorder.refused() == 0
    assert recorder.gap_s() < 5


def lose(platform: Platform, recorder: Recorder) -> None:
    del platform.rows[some(recorder)]


def go_back(platform: Platform, recorder: Recorder) -> None:
    platform.rows[some(recorder)]["version"] = 2


def change_the_end(platform: Platform, recorder: Recorder) -> None:
    platform.rows[some(recorder)] |= {"status": "failed", "version": 4}


def charge_twice(platform: Platform, recorder: Recorder) -> None:
    platform.rows[some(recorder)] |= {"payment_intent": "pi_another", "version": 4}


def mix_up(platform: Platform, recorder: Recorder) -> None:
    first, second = list(recorder.told)[:2]
    recorder.told[first] = recorder.told[second]
    platform.rows[first]["payment_intent"] = None


@pytest.mark.parametrize(
    ("lie", "text"),
    [
        (lose, "was answered 404"),
        (go_back, "answered backwards"),
        (change_the_end, "was succeeded and is failed"),
        (charge_twice, "has two intents"),
        (mix_up, "two payments have one intent"),
    ],
)
async def test_every_lie_is_named(lie: Lie, text: str) -> None:
    found, _ = await violations(lie)
    assert any(text in each for each in found), found


async def test_only_a_503_that_says_when_to_come_again_is_no_violation() -> None:
    honest = web.json_response({}, status=503, headers={"Retry-After": "1"})
    found, recorder = await violations(lambda _platform, _recorder: None, [honest])
    assert (found, recorder.refused()) == ([], 1)
    for refusal in (web.json_response({}, status=503), web.json_response({}, status=500)):
        found, _ = await violations(lambda _platform, _recorder: None, [refusal])
        assert len(found) == 1
