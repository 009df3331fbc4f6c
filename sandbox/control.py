"""The control API that all stand-ins share: faults, clock, counts. It needs no key and is never hit by a fault."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from aiohttp import web

from sandbox.clock import Clock
from sandbox.counts import Counts
from sandbox.faults import Faults, FaultSettings

PREFIX = "/_control/"
ADVANCE_MAX_S = 10 * 365 * 86_400

_encode = msgspec.json.Encoder(decimal_format="number").encode


class Advance(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /_control/clock`."""

    advance_s: float


def reply(value: object, status: int = 200) -> web.Response:
    """`value` as a JSON answer."""
    return web.Response(body=_encode(value), status=status, headers={"Content-Type": "application/json"})


class Control:
    """Answers calls under `/_control/`. `more` adds a stand-in's own calls, by `(method, name)`."""

    def __init__(
        self,
        *,
        clock: Clock,
        counts: Counts,
        faults: Faults,
        more: dict[tuple[str, str], Callable[[bytes], object]] | None = None,
    ) -> None:
        self._clock = clock
        self._counts = counts
        self._faults = faults
        self._calls: dict[tuple[str, str], Callable[[bytes], object]] = {
            ("GET", "faults"): lambda _: faults.settings,
            ("PUT", "faults"): self._put_faults,
            ("GET", "clock"): lambda _: {"now": clock.now(), "offset_s": clock.offset_s},
            ("POST", "clock"): self._advance,
            ("GET", "counts"): lambda _: counts.report(),
            **(more or {}),
        }

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """Answer one call; 400 names what is wrong with its body."""
        call = self._calls.get((request.method, request.path.removeprefix(PREFIX)))
        if call is None:
            return reply({"error": f"no such control call: {request.method} {request.path}"}, 404)
        try:
            return reply(call(await request.read()))
        except (ValueError, msgspec.DecodeError) as error:
            return reply({"error": str(error)}, 400)

    def _put_faults(self, body: bytes) -> object:
        self._faults.replace(msgspec.json.decode(body or b"{}", type=FaultSettings))
        return self._faults.settings

    def _advance(self, body: bytes) -> object:
        seconds = msgspec.json.decode(body, type=Advance).advance_s
        if not 0 <= seconds <= ADVANCE_MAX_S:
            raise ValueError("advance_s is from 0 to ten years")
        self._clock.advance(seconds)
        return {"now": self._clock.now(), "offset_s": self._clock.offset_s}
