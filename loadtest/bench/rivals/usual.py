"""The usual way: FastAPI, SQLAlchemy Core over asyncpg, one transaction a request. One process; several share a port.

python -m loadtest.bench.rivals.usual --port 18000
"""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Header, Response
from pydantic import BaseModel, Field
from sqlalchemy import BigInteger, Column, DateTime, MetaData, String, Table, select
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import create_async_engine

from loadtest.bench.rivals.common import arguments, dsn, listen

POOL = 16
PAYMENTS = Table(
    "usual",
    MetaData(schema="rivals"),
    Column("key", String, primary_key=True),
    Column("buyer", String),
    Column("currency", String),
    Column("amount", BigInteger),
    Column("items", JSONB),
    Column("payment_method", String),
    Column("status", String),
    Column("created_at", DateTime(timezone=True)),
)


class Item(BaseModel):
    seller: str = Field(min_length=1, max_length=200)
    amount: int = Field(gt=0)
    quantity: int = Field(1, gt=0)
    description: str = ""


class Payment(BaseModel):
    buyer: str = Field(min_length=1, max_length=200)
    currency: str = Field(min_length=3, max_length=3)
    items: list[Item] = Field(min_length=1)
    payment_method: str = ""


def application() -> FastAPI:
    engine = create_async_engine(dsn().replace("postgresql:", "postgresql+asyncpg:"), pool_size=POOL, max_overflow=0)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/payments", status_code=202)
    async def submit(payment: Payment, response: Response, idempotency_key: Annotated[str, Header()]) -> dict[str, Any]:
        key = idempotency_key.strip('"')
        row = {
            "key": key,
            "buyer": payment.buyer,
            "currency": payment.currency,
            "amount": sum(item.amount * item.quantity for item in payment.items),
            "items": [item.model_dump() for item in payment.items],
            "payment_method": payment.payment_method,
            "status": "created",
            "created_at": datetime.datetime.now(datetime.UTC),
        }
        async with engine.begin() as connection:
            made = await connection.execute(insert(PAYMENTS).values(row).on_conflict_do_nothing().returning(PAYMENTS.c.key))
            if made.first() is None:
                response.status_code = 200
                found = await connection.execute(select(PAYMENTS).where(PAYMENTS.c.key == key))
                row = dict(found.mappings().one())
        return row

    return app


def main() -> None:
    port = arguments(__doc__).port
    config = uvicorn.Config(application(), loop="uvloop", http="httptools", access_log=False, log_level="warning", lifespan="on")
    uvicorn.Server(config).run(sockets=[listen(port)])


if __name__ == "__main__":
    main()
