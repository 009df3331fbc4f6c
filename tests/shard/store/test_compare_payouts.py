"""Payouts that a restored shard lacks: a real database, and the stand-in for Tipalti."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence

import asyncpg
import pytest

from oncepay.keys import payout_key, slot
from oncepay.payout import Payout, new_payout
from oncepay.settings import TipaltiSettings
from oncepay.tipalti_client import TipaltiClient
from shard.store import compare_payouts
from shard.store.compare_payouts import unknown_payouts
from shard.store.migrate import migrate
from tests.postgres_fixture import PostgresServer, postgres_server
from tests.sandbox.process import StandIn

__all__ = ["postgres_server"]

ALL, LOW, HIGH = [(0, 65_535)], [(0, 32_767)], [(32_768, 65_535)]


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    made = StandIn("tipalti").start()
    yield made
    made.stop()


@pytest.fixture
async def tipalti(stand_in: StandIn) -> AsyncIterator[TipaltiClient]:
    async with TipaltiClient(TipaltiSettings(base_url=stand_in.url, refresh_token="rt_test_1")) as opened:
        yield opened


@pytest.fixture
async def shard(postgres_server: PostgresServer) -> AsyncIterator[asyncpg.Connection]:
    dsn = postgres_server.new_database()
    await migrate(dsn, shard="s0", ranges=ALL, passwords={})
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


def payout(seller: str, sequence: int) -> Payout:
    return new_payout(
        seller, "usd", sequence, amount=100 + sequence, payee=seller, run="r", created_by="ann", positions={},
        needs_approval=False, now_ms=time.time_ns() // 1_000_000,
    )  # fmt: skip


async def known(shard: asyncpg.Connection, *payouts: Payout) -> None:
    """Rows, as the shard has them."""
    for each in payouts:
        await shard.execute(
            "insert into oncepay.payouts select oncepay.slot_of($1), $1, $2, $3, $4, 'created', 1, $5, $6, $7, 'r', 'ann', '{}',"
            " '{}', true, 'made', 'test', now(), now()",
            each.key, each.seller, each.currency, each.sequence, each.amount, each.payee, each.ref_code,
        )  # fmt: skip


async def submitted(stand_in: StandIn, tipalti: TipaltiClient, seller: str, sequences: Sequence[int]) -> None:
    await tipalti.create_payee(seller)
    stand_in.control("POST", "payee", {"payee": seller, "payable": True})
    lines = await tipalti.submit([payout(seller, sequence) for sequence in sequences])
    assert len(lines) == len(sequences)


async def test_payouts_after_the_last_known_one_are_named(
    shard: asyncpg.Connection, stand_in: StandIn, tipalti: TipaltiClient
) -> None:
    """However many, as long as one follows another."""
    await submitted(stand_in, tipalti, "ada", range(1, 15))
    await submitted(stand_in, tipalti, "bob", range(1, 4))
    await submitted(stand_in, tipalti, "nobody", [1])
    await known(shard, *(payout(seller, sequence) for seller in ("ada", "bob") for sequence in (1, 2, 3)))
    found = await unknown_payouts(shard, tipalti, ALL)
    assert (found.sellers, found.left_out) == (2, 0)
    assert [(each.seller, each.currency, each.sequence, each.amount) for each in found.missing] == [
        ("ada", "usd", sequence, 100 + sequence) for sequence in range(4, 15)
    ]
    assert found.missing[0].key == "payout:ada:usd:4"
    assert found.missing[0].payment
    assert found.looked_up < 40


async def test_only_those_of_the_ranges_are_the_shards(
    shard: asyncpg.Connection, stand_in: StandIn, tipalti: TipaltiClient
) -> None:
    await submitted(stand_in, tipalti, "cleo", range(1, 21))
    low = [number for number in range(1, 21) if slot(payout_key("cleo", "usd", number)) <= LOW[0][1]]
    await known(shard, payout("cleo", low[0]))
    assert [each.sequence for each in (await unknown_payouts(shard, tipalti, LOW)).missing] == low[1:]
    assert (await unknown_payouts(shard, tipalti, HIGH)).sellers == 0


async def test_there_is_a_bound_and_what_is_beyond_is_counted(
    shard: asyncpg.Connection, stand_in: StandIn, tipalti: TipaltiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submitted(stand_in, tipalti, "dan", range(1, 12))
    await known(shard, payout("dan", 1), payout("eve", 1))
    monkeypatch.setattr(compare_payouts, "ROUNDS_MAX", 1)
    found = await unknown_payouts(shard, tipalti, ALL)
    assert (len(found.missing), found.left_out) == (compare_payouts.NEXT, 1)
    monkeypatch.setattr(compare_payouts, "SELLERS_MAX", 0)
    assert (await unknown_payouts(shard, tipalti, ALL)).left_out == 2
