"""Promise 6 at the aggregator's door: what its API answers, against what its database holds."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from loadtest.checker.model import Derived, Findings, Misread, Progress, State, Target, Unreachable

SELLERS_MAX = 100
"""Sellers asked for, the largest and a spread over the others; all sums are compared in the database."""
BUYERS_MAX = 20
ORDERS_PAGE = 500
AT_ONCE = 8
TRIES = 6
GAP_S = 0.3
TIMEOUT_S = 40.0
_ADVICE = "the API and the database of the aggregator disagree: see the aggregator's log"


class _Row(msgspec.Struct):
    payments: int
    gross: int
    refunded: int
    disputed: int
    fees: int
    net: int


class _Revenue(msgspec.Struct):
    rows: list[_Row]
    positions: dict[str, str]


class _Order(msgspec.Struct):
    key: str
    status: str
    version: int
    currency: str
    amount: int
    amount_captured: int
    amount_refunded: int
    payment_intent: str | None


class _Orders(msgspec.Struct):
    orders: list[_Order]
    positions: dict[str, str]
    cursor: str | None = None


T = TypeVar("T")


class Api:
    """Asks the aggregator's API."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url.rstrip("/")

    async def get(self, path: str, answer_type: type[T]) -> T:
        """The answer. Raises Unreachable after TRIES, Misread when it is another one."""
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(GAP_S * attempt)
            try:
                async with self._session.get(self._url + path) as answer:
                    body = await answer.read()
                    if answer.status == 200:
                        return msgspec.json.decode(body, type=answer_type)
                    problem = f"HTTP {answer.status} {body[:200].decode(errors='replace')}"
                    if answer.status < 500 and answer.status != 429:
                        raise Misread(f"the aggregator at {path}: {problem}")
            except msgspec.DecodeError as error:
                raise Misread(f"the aggregator at {path}: {error}") from error
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = str(error) or type(error).__name__
        raise Unreachable(f"the aggregator at {self._url} can't be reached: {problem}")


async def check_api(target: Target, derived: Derived, progress: Progress, found: Findings) -> None:
    """Revenue of sellers and orders of buyers, as the API answers them."""
    sellers, buyers = _sellers(derived), _buyers(derived)
    total, done = len(sellers) + len(buyers), 0
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(check: Callable[[], Awaitable[None]]) -> None:
        nonlocal done
        async with gate:
            await check()
        done += 1
        progress("the aggregator's API", done, total)

    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    headers = {"Authorization": f"Bearer {target.api_key}"}
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session, asyncio.TaskGroup() as group:
        api = Api(session, target.aggregator_url)
        for name, sums in sellers:
            group.create_task(one(partial(_revenue, api, name, sums, derived, found)))
        for buyer, states in buyers:
            group.create_task(one(partial(_orders, api, buyer, states, derived, found)))
    found.checked["api_answers"] = total


def _spread(names: list[T], limit: int) -> list[T]:
    """The first half of the limit, and others evenly from the rest."""
    if len(names) <= limit:
        return names
    head, rest = names[: limit // 2], names[limit // 2 :]
    return head + rest[:: max(1, len(rest) // (limit - len(head)))][: limit - len(head)]


def _sellers(derived: Derived) -> list[tuple[tuple[str, str], tuple[int, ...]]]:
    sums: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * 6)
    for (seller, currency, _), day in derived.seller_days.items():
        row = sums[seller, currency]
        for n, value in enumerate(day):
            row[n] += value
    ordered = sorted(sums.items(), key=lambda item: (-item[1][1], item[0]))
    return [(name, tuple(row)) for name, row in _spread(ordered, SELLERS_MAX)]


def _buyers(derived: Derived) -> list[tuple[str, dict[str, State]]]:
    payments: defaultdict[str, dict[str, State]] = defaultdict(dict)
    for key, state in derived.payments.items():
        payments[state.buyer][key] = state
    fitting = [(buyer, states) for buyer, states in payments.items() if len(states) <= ORDERS_PAGE]
    return _spread(sorted(fitting, key=lambda item: (-len(item[1]), item[0])), BUYERS_MAX)


def _position(text: str) -> int:
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) | int(low, 16)


def _differ(found: Findings, derived: Derived, positions: dict[str, str], key: str, what: str) -> None:
    """Not where the aggregator has gone on since its database was read: then the next look tells."""
    if {shard: _position(text) for shard, text in positions.items()} == derived.positions:
        found.differ(6, key, what, _ADVICE)
    else:
        found.waiting.add(f"the aggregator to stand still for {key}")


async def _revenue(api: Api, name: tuple[str, str], sums: tuple[int, ...], derived: Derived, found: Findings) -> None:
    seller, currency = name
    answer = await api.get(f"/v1/sellers/{quote(seller, safe='')}/revenue?currency={currency}", _Revenue)
    shown = tuple(sum(column) for column in zip(*map(msgspec.structs.astuple, answer.rows), strict=True))
    if shown != sums and any((*shown, *sums)):
        _differ(found, derived, answer.positions, seller, f"the API shows {shown} {currency}, the database has {sums}")


async def _orders(api: Api, buyer: str, states: dict[str, State], derived: Derived, found: Findings) -> None:
    answer = await api.get(f"/v1/buyers/{quote(buyer, safe='')}/orders?limit={ORDERS_PAGE}", _Orders)
    shown = {order.key: _shown(order) for order in answer.orders}
    held = {key: _held(state) for key, state in states.items()}
    for key in _unequal(shown, held):
        _differ(found, derived, answer.positions, key, f"the API shows {shown.get(key)}, the database has {held.get(key)}")


def _shown(order: _Order) -> tuple[object, ...]:
    return (
        *(order.status, order.version, order.currency, order.amount, order.amount_captured, order.amount_refunded),
        order.payment_intent or "",
    )


def _held(state: State) -> tuple[object, ...]:
    return state.status, state.version, state.currency, state.amount, state.captured, state.refunded, state.intent


def _unequal(one: dict[str, tuple[object, ...]], other: dict[str, tuple[object, ...]]) -> Iterable[str]:
    return (key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
