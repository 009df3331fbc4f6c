"""Reads Tipalti's lists over plain HTTP: all payments, and what came to the balance from the bank."""

from __future__ import annotations

import asyncio
import email.utils
import time
from decimal import Decimal
from typing import Generic, TypeVar

import aiohttp
import msgspec

from loadtest.checker.model import Funding, Misread, PaidOut, Progress, Target, Tipalti, Unreachable

PAGE = 250
TRIES = 10
FIRST_GAP_S = 0.1
MAX_GAP_S = 3.0
TIMEOUT_S = 30.0
ZERO_DECIMAL = frozenset(["bif", "clp", "djf", "gnf", "jpy", "kmf", "krw", "pyg", "rwf", "vnd", "vuv", "xaf", "xof", "xpf"])
THREE_DECIMAL = frozenset(["bhd", "jod", "kwd", "omr", "tnd"])


class _Amount(msgspec.Struct):
    amount: Decimal
    currency: str

    def minor(self) -> int:
        currency = self.currency.lower()
        return int(self.amount.scaleb(0 if currency in ZERO_DECIMAL else 3 if currency in THREE_DECIMAL else 2))


class _Payment(msgspec.Struct):
    id: str
    refCode: str
    status: str
    amountSubmitted: _Amount
    payerFees: _Amount | None = None
    submittedDate: int = 0
    statusChangedDate: int = 0


class _Funding(msgspec.Struct):
    id: str
    amount: _Amount
    createdDate: int = 0


T = TypeVar("T", _Payment, _Funding)


class _Page(msgspec.Struct, Generic[T]):
    items: list[T]
    nextCursor: str | None = None


class _Token(msgspec.Struct):
    access_token: str


class TipaltiLists:
    """A payer's lists."""

    def __init__(self, target: Target) -> None:
        self._url = target.tipalti_url.rstrip("/")
        self._target = target
        self._token = ""
        self._clock = 0.0

    async def read(self, progress: Progress) -> Tipalti:
        """All payments and fundings. Raises Unreachable or Misread."""
        tipalti = Tipalti()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
            for payment in await self._list(session, "payments", _Page[_Payment], progress):
                fee, amount = payment.payerFees, payment.amountSubmitted
                tipalti.payments.append(
                    PaidOut(
                        *(payment.id, payment.refCode, payment.status, amount.currency.lower(), amount.minor()),
                        *(fee.currency.lower() if fee else "", fee.minor() if fee else 0),
                        *(payment.submittedDate, payment.statusChangedDate),
                    )
                )
            for funding in await self._list(session, "fundings", _Page[_Funding], progress):
                amount = funding.amount
                tipalti.fundings.append(Funding(funding.id, amount.currency.lower(), amount.minor(), funding.createdDate))
        tipalti.now = self._clock
        return tipalti

    async def _list(self, session: aiohttp.ClientSession, name: str, page_type: type[_Page[T]], progress: Progress) -> list[T]:
        decoder = msgspec.json.Decoder(page_type)
        found: list[T] = []
        query = {"limit": str(PAGE)}
        while True:
            try:
                page = decoder.decode(await self._page(session, f"{self._url}/api/v1/{name}", query))
            except msgspec.DecodeError as error:
                raise Misread(f"Tipalti's list of {name}: {error}") from error
            found += page.items
            progress(f"Tipalti's {name}", len(found), None if page.nextCursor else len(found))
            if page.nextCursor is None:
                return found
            query["cursor"] = page.nextCursor

    async def _page(self, session: aiohttp.ClientSession, url: str, query: dict[str, str]) -> bytes:
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(min(MAX_GAP_S, FIRST_GAP_S * 2 ** (attempt - 1)))
            try:
                if not self._token:
                    await self._sign_in(session)
                headers = {"Authorization": f"Bearer {self._token}"}
                async with session.get(url, params=query, headers=headers) as answer:
                    body = await answer.read()
                    if answer.status == 200:
                        date = answer.headers.get("Date")
                        now = email.utils.parsedate_to_datetime(date).timestamp() if date else time.time()
                        self._clock = max(self._clock, now)
                        return body
                    problem = f"HTTP {answer.status} {body[:200].decode(errors='replace')}"
                    if answer.status == 401:
                        self._token = ""
                    elif answer.status < 500 and answer.status != 429:
                        raise Misread(f"Tipalti at {url}: {problem}")
            except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
                problem = str(error) or type(error).__name__
        raise Unreachable(f"Tipalti at {url} can't be reached: {problem}")

    async def _sign_in(self, session: aiohttp.ClientSession) -> None:
        target = self._target
        form = {
            "grant_type": "refresh_token",
            "client_id": target.tipalti_client_id,
            "client_secret": target.tipalti_client_secret,
            "refresh_token": target.tipalti_refresh_token,
        }
        async with session.post(f"{self._url}/connect/token", data=form) as answer:
            body = await answer.read()
            if answer.status == 400:
                raise Misread(f"Tipalti refuses the refresh token: {body[:200].decode(errors='replace')}")
            if answer.status == 200:
                self._token = msgspec.json.decode(body, type=_Token).access_token
