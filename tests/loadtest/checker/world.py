"""A small world to check: two shards, the aggregator and the stand-in for Stripe, with payments in every state.

Its rows come from the project's own state machine, on what the stand-in really answers. There is no cluster around it:
tests change what they like, behind every constraint's back.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
import asyncpg
import msgspec

from aggregator.migrate import migrate as migrate_aggregator
from loadtest.checker import Report, ShardTarget, Target, verify
from oncepay.cart import Fee, Item, shares_of
from oncepay.feed import EntryRow, FeedBatch, LinkRow, PaymentRow, encode_batch
from oncepay.payment import Failure, Key, Payment, Status, Terms
from oncepay.payment_text import progress_text, terms_text
from oncepay.settings import StripeSettings
from oncepay.stripe_client import Declined, StripeGateway
from oncepay.transition import AttemptDeclined, AttemptStarted, Event, GiveUp, IntentCreated, IntentSeen, move
from shard.store.migrate import migrate as migrate_shard
from tests.aggregator.process import TOKEN, aggregator
from tests.aggregator.strategies import slot_of
from tests.etcd_fixture import dying_with_parent, free_ports
from tests.postgres_fixture import PostgresServer

RANGES = {"s0": [(0, 32767)], "s1": [(32768, 65535)]}
VERSION = StripeSettings().api_version
FAR = 1 << 40
"""How far the feeds are past the shards' logs, so that whatever the aggregator lacks is not on its way."""
SUCCEEDED = [f"paid-{n}" for n in range(12)]
FAILED, CANCELED, OPEN = ["failed-0", "failed-1"], ["canceled-0"], ["cart-0", "cart-1"]


@dataclass
class World:
    """Where everything is."""

    server: PostgresServer
    shard_dsns: dict[str, str]
    aggregator_dsn: str
    aggregator_url: str
    stripe_url: str
    lsn: dict[str, int] = field(default_factory=dict)

    def target(self, *, wait_s: float = 0.0, grace_s: float = 0.0, aggregator_url: str | None = None) -> Target:
        return Target(
            shards=tuple(ShardTarget(name, dsn, tuple(RANGES[name])) for name, dsn in self.shard_dsns.items()),
            aggregator_dsn=self.aggregator_dsn,
            aggregator_url=self.aggregator_url if aggregator_url is None else aggregator_url,
            stripe_url=self.stripe_url,
            stripe_key="sk_test_world",
            wait_s=wait_s,
            grace_s=grace_s,
        )

    async def verify(self, *, wait_s: float = 0.0, grace_s: float = 0.0) -> Report:
        return await verify(self.target(wait_s=wait_s, grace_s=grace_s))

    @staticmethod
    def shard_of(key: str) -> str:
        return "s0" if slot_of(key) < 32768 else "s1"

    async def sql(self, where: str, statement: str, *args: object) -> None:
        """Change a shard (named, or by a key of its) or the aggregator, with all triggers off."""
        dsn = (
            self.aggregator_dsn if where == "aggregator" else self.shard_dsns.get(where) or self.shard_dsns[self.shard_of(where)]
        )
        connection = await asyncpg.connect(dsn, server_settings={"session_replication_role": "replica"})
        try:
            await connection.execute(statement, *args)
        finally:
            await connection.close()

    async def intent_of(self, key: str) -> str:
        connection = await asyncpg.connect(self.shard_dsns[self.shard_of(key)])
        try:
            return str(await connection.fetchval("select intent from oncepay.payments where key = $1", key))
        finally:
            await connection.close()

    async def stripe(self, path: str, **form: str) -> str:
        """POST to the stand-in as somebody else; the object's id."""
        headers = {"Authorization": "Bearer sk_test_other"}
        async with aiohttp.ClientSession(headers=headers) as session, session.post(self.stripe_url + path, data=form) as answer:
            body = await answer.json()
            assert answer.status == 200, body
            return str(body["id"])

    async def until_posted(self, intent: str) -> None:
        """Until the intent's charge has its balance transaction."""
        headers = {"Authorization": "Bearer sk_test_other"}
        url = f"{self.stripe_url}/v1/payment_intents/{intent}?expand[]=latest_charge"
        async with aiohttp.ClientSession(headers=headers) as session, asyncio.timeout(20):
            while True:
                async with session.get(url) as answer:
                    if (await answer.json())["latest_charge"]["balance_transaction"]:
                        return
                await asyncio.sleep(0.1)

    async def feed(self, batch: FeedBatch) -> None:
        """Hand a batch to the aggregator."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.post(f"{self.aggregator_url}/v1/feed", data=encode_batch(batch)) as answer:
                assert (await answer.json())["applied"], await answer.text()
        self.lsn[batch.shard] = batch.to_lsn


@contextlib.contextmanager
def stand_in() -> Iterator[str]:
    """The stand-in for Stripe as a process of its own; its origin."""
    port = free_ports(1)[0]
    command = dying_with_parent(sys.executable, "-m", "sandbox.stripe", "--port", str(port))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"{url}/_control/counts", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the stand-in for Stripe didn't start") from None
                time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait(timeout=10)


@contextlib.contextmanager
def databases_and_services() -> Iterator[World]:
    """Everything, still without a payment."""
    with PostgresServer() as server, stand_in() as stripe_url:
        dsn = server.new_database("aggregated")
        with aggregator(dsn, wait=False) as process:
            shards = {name: server.new_database(name) for name in RANGES}
            yield World(server, shards, dsn, process.url, stripe_url)


async def migrate(world: World) -> None:
    await migrate_aggregator(world.aggregator_dsn, passwords={})
    for name, dsn in world.shard_dsns.items():
        await migrate_shard(dsn, shard=name, ranges=RANGES[name], passwords={})


class Merchant:
    """Makes payments at the stand-in, and their rows in the shards."""

    def __init__(self, world: World, gateway: StripeGateway) -> None:
        self._world = world
        self._gateway = gateway

    async def pay(self, key: str, card: str, until: str) -> Payment:
        """A payment that gets to `until`: a terminal status, or `attempted`. Its row and entries are written."""
        n = slot_of(key) % 7
        items = (Item("ann", 1000 + n), Item("bob", 333, 1 + n % 3), Item("platform", 49))
        shares = shares_of(items, {}, Fee(1000, 30))
        now_ms = int(time.time() * 1000)
        method = "" if until == "attempted" else card
        terms = Terms(items, shares, VERSION, on_decline="fail", metadata={}, payment_method=method)
        amount = sum(share.gross for share in shares)
        self._entries: list[tuple[object, ...]] = []
        self._links: list[tuple[object, ...]] = []
        self._payment = Payment(
            Key(key), Status.CREATED, 1, f"buyer-{n}", "usd", amount, terms, b"f", now_ms, now_ms, now_ms + 86_400_000
        )
        parameters: dict[str, object] = {"amount": amount, "currency": "usd", "metadata": {"oncepay_key": key}}
        parameters["payment_method_types"] = ["card"]
        view = await self._gateway.create(parameters, f"{key}:create", VERSION)
        self._apply(IntentCreated(view.id, view.client_secret))
        if until != "attempted":
            await self._finish(view.id, key, card, until)
        await self._write()
        return self._payment

    async def _finish(self, intent: str, key: str, card: str, until: str) -> None:
        if until == "canceled":
            self._apply(GiveUp("requested"))
        else:
            self._apply(AttemptStarted(1, card))
            try:
                await self._gateway.confirm(intent, {"payment_method": card}, f"{key}:confirm:1", VERSION)
            except Declined as declined:
                self._apply(AttemptDeclined(1, declined.charge, Failure(code="card_declined")))
                self._apply(GiveUp("declined"))
        if self._payment.status is Status.CANCELING:
            await self._gateway.cancel(intent, f"{key}:cancel", VERSION)
        self._apply(IntentSeen(await self._gateway.retrieve(intent)))
        assert self._payment.status == until
        async with asyncio.timeout(20):
            while until == "succeeded" and self._payment.progress.stripe_fee < 0:
                await asyncio.sleep(0.1)  # Stripe posts the balance transaction a moment later
                self._apply(IntentSeen(await self._gateway.retrieve(intent)))

    def _apply(self, event: Event) -> None:
        moved = move(self._payment, event)
        self._payment = moved.payment
        for entry in moved.entries:
            postings = entry.postings
            self._entries.append(
                (
                    *(entry.entry_id, entry.kind, entry.currency, entry.source, [p.account for p in postings]),
                    *([p.amount_minor for p in postings], [p.seller for p in postings]),
                )
            )
        self._links += [(link.entry_id, link.balance_transaction) for link in moved.links]

    async def _write(self) -> None:
        payment = self._payment
        slot = slot_of(payment.key)
        old = slot % 2 == 0  # as earlier versions kept it
        terms, progress = msgspec.json.encode(payment.terms).decode(), msgspec.json.encode(payment.progress).decode()
        connection = await asyncpg.connect(self._world.shard_dsns[self._world.shard_of(payment.key)])
        try:
            await connection.execute(
                "insert into oncepay.payments values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12::text::jsonb,"
                " $13::text::jsonb, $14, false, 'test', 'test', now(), now(), now() + interval '1 day', $15, $16)",
                *(slot, payment.key, payment.status.value, payment.version, payment.buyer, payment.currency, payment.amount),
                *(payment.amount_captured, payment.amount_refunded, payment.intent or None, payment.fingerprint),
                *((terms, progress) if old else (None, None)),
                payment.open_work,
                *((None, None) if old else (terms_text(payment.terms), progress_text(payment.progress))),
            )
            statement = "insert into oncepay.entries values ($1, $2, $3, $4, $5, $6, $7, $8, $9, now())"
            await connection.executemany(statement, [(slot, payment.key, *entry) for entry in self._entries])
            statement = "insert into oncepay.balance_links values ($1, $2, $3, $4, now())"
            await connection.executemany(statement, [(slot, payment.key, *link) for link in self._links])
        finally:
            await connection.close()


async def fill(world: World) -> None:
    """Payments in every state, and all of them in the aggregator."""
    settings = StripeSettings(base_url=world.stripe_url, api_key="sk_test_world")
    async with StripeGateway(settings) as gateway:
        merchant = Merchant(world, gateway)
        for key in SUCCEEDED:
            await merchant.pay(key, "pm_card_visa", "succeeded")
        for key in FAILED:
            await merchant.pay(key, "pm_card_visa_chargeDeclined", "failed")
        for key in CANCELED:
            await merchant.pay(key, "", "canceled")
        for key in OPEN:
            await merchant.pay(key, "", "attempted")
    for shard in world.shard_dsns:
        await world.feed(await whole_feed(world, shard))


async def whole_feed(world: World, shard: str) -> FeedBatch:
    """All rows of a shard as one batch."""
    micros = "(extract(epoch from {}) * 1000000)::bigint"
    connection = await asyncpg.connect(world.shard_dsns[shard])
    try:
        lsn = await connection.fetchval("select pg_current_wal_insert_lsn()")
        payments = await connection.fetch(
            "select slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, intent,"
            " coalesce(agreed, terms::text), coalesce(course, progress::text),"
            f" {micros.format('created_at')}, {micros.format('updated_at')}, {micros.format('expires_at')}"
            " from oncepay.payments"
        )
        entries = await connection.fetch(
            "select slot, key, entry_id, kind, currency, source, accounts, amounts, sellers,"
            f" {micros.format('created_at')} as created_at_us from oncepay.ledger"
        )
        links = await connection.fetch(
            f"select slot, key, entry_id, balance_transaction, {micros.format('created_at')} from oncepay.transaction_links"
        )
    finally:
        await connection.close()
    return FeedBatch(
        *(shard, "i", 1, 0, lsn + FAR),
        tuple(PaymentRow(lsn, 0, *row) for row in payments),
        tuple(_entry_row(lsn, row) for row in entries),
        tuple(LinkRow(lsn, 0, *row) for row in links),
    )


def _entry_row(lsn: int, row: asyncpg.Record) -> EntryRow:
    members = dict(row) | {name: tuple(row[name]) for name in ("accounts", "amounts", "sellers")}
    return EntryRow(lsn=lsn, committed_at_ms=0, **members)
