"""The floor: a bare aiohttp handler with msgspec and group commit, and no rule at all. One process; several share a port.

No API key, no check of what was sent, no slots, ranges or versions, no evidence after the commit. What came in while a batch
was on its way is the next one, with two writers.

python -m loadtest.bench.rivals.bare --port 18000
"""

from __future__ import annotations

import asyncio
import datetime
from collections import deque

import asyncpg
import msgspec
import uvloop
from aiohttp import web

from loadtest.bench.rivals.common import arguments, dsn, listen

WRITERS = 2
ROWS_MAX = 400
INSERT = """
    insert into rivals.bare (key, buyer, currency, amount, items, payment_method, status, created_at)
    select u.key, u.buyer, u.currency, u.amount, u.items::jsonb, u.payment_method, 'created', u.created_at
    from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::text[], $7::timestamptz[])
        u (key, buyer, currency, amount, items, payment_method, created_at)
    on conflict do nothing
"""


class Item(msgspec.Struct):
    seller: str
    amount: int
    quantity: int = 1
    description: str = ""


class Payment(msgspec.Struct):
    buyer: str
    currency: str
    items: list[Item]
    payment_method: str = ""


Row = tuple[str, str, str, int, str, str, datetime.datetime]
_decode = msgspec.json.Decoder(Payment).decode
_encode = msgspec.json.encode


class Batches:
    def __init__(self) -> None:
        self._waiting: deque[tuple[Row, asyncio.Future[None]]] = deque()
        self._arrived = asyncio.Event()

    async def put(self, row: Row) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future))
        self._arrived.set()
        await future

    async def write(self) -> None:
        connection = await asyncpg.connect(dsn())
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), ROWS_MAX))]
            columns = [list(column) for column in zip(*(row for row, _ in batch), strict=True)]
            await connection.execute(INSERT, *columns)
            for _, future in batch:
                future.set_result(None)


def main() -> None:
    port = arguments(__doc__).port
    batches = Batches()

    async def submit(request: web.Request) -> web.Response:
        payment = _decode(await request.read())
        key = request.headers["Idempotency-Key"]
        amount = sum(item.amount * item.quantity for item in payment.items)
        now = datetime.datetime.now(datetime.UTC)
        items = _encode(payment.items).decode()
        await batches.put((key, payment.buyer, payment.currency, amount, items, payment.payment_method, now))
        answer = {"key": key, "status": "created", "buyer": payment.buyer, "amount": amount, "items": payment.items}
        return web.Response(body=_encode(answer), status=202, content_type="application/json")

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/payments", submit)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.SockSite(runner, listen(port), backlog=1024).start()
        async with asyncio.TaskGroup() as group:
            for _ in range(WRITERS):
                group.create_task(batches.write())

    uvloop.run(serve())


if __name__ == "__main__":
    main()
