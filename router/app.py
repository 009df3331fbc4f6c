"""The router: the public API of payments, and the webhooks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from oncepay.budget import Budget
from oncepay.driver import Driver
from oncepay.errors import EtcdUnavailable, ShardUnavailable
from oncepay.payment import Payment
from oncepay.service import Service, run
from oncepay.stripe_client import StripeGateway
from oncepay.tipalti_client import TipaltiClient
from router.commands import Commands
from router.docs import docs_page
from router.fees import Fees
from router.inflight import InFlight
from router.lists import Lists
from router.macs import Macs
from router.notifications import TipaltiNotifications
from router.openapi import document
from router.payments import PaymentCalls
from router.sellers import Sellers
from router.webhooks import Finished, Secrets, StripeWebhooks
from shard.store.payouts import PayoutStore
from shard.store.store import Shards

STOP_S = 8.0


@asynccontextmanager
async def start(service: Service) -> AsyncIterator[None]:
    """Register the calls, then watch etcd in the background until the store is ready."""
    settings = service.settings
    store = Shards(service.etcd, settings, role="oncepay_router", password=settings.postgres.router_password, actor=service.name)
    macs = Macs(service.etcd)
    in_flight = InFlight(store)
    fees = Fees(store, refuse_unknown=settings.fee.unknown_sellers == "refuse")
    budget = Budget(service.etcd, settings.stripe, name=service.name, role="router")
    async with StripeGateway(settings.stripe, budget) as stripe, TipaltiClient(settings.tipalti) as tipalti:
        finished = Finished()

        def moved(payment: Payment) -> None:
            finished.moved(payment)
            in_flight.moved(payment)

        driver = Driver(store, stripe, moved, fee_back=settings.fee.refunded)
        payments = PaymentCalls(settings, store, fees, driver, in_flight, macs)
        commands = Commands(settings, store, driver, in_flight, macs)
        lists = Lists(store, stripe, driver)
        sellers = Sellers(store, fees, service.name)
        webhooks = StripeWebhooks(store, driver, Secrets(settings.stripe.webhook_secret_files), finished)
        payouts = PayoutStore(store, service.name)
        notifications = TipaltiNotifications(payouts, tipalti, Secrets(settings.tipalti.notification_secret_files))
        service.busy_route("POST", "/v1/payments", payments.submit, scope="pay")
        service.busy_route("GET", "/v1/payments/{key}", payments.show, scope="read")
        service.route("GET", "/v1/payments", lists.payments, scope="read")
        service.busy_route("POST", "/v1/payments/{key}/confirm", commands.confirm, scope="pay")
        service.busy_route("POST", "/v1/payments/{key}/cancel", commands.cancel, scope="pay")
        service.busy_route("POST", "/v1/payments/{key}/capture", commands.capture, scope="pay")
        service.busy_route("POST", "/v1/payments/{key}/refunds", commands.refund, scope="refund")
        service.route("GET", "/v1/disputes", lists.disputes, scope="read")
        service.route("POST", "/v1/payments/{key}/disputes/{dispute}/evidence", lists.evidence, scope="operate")
        service.route("PUT", "/v1/sellers/{id}", sellers.put, scope="operate")
        service.route("GET", "/v1/sellers/{id}", sellers.show, scope="read")
        service.busy_route("POST", "/v1/webhooks/stripe", webhooks.receive)
        service.route("POST", "/v1/webhooks/tipalti", notifications.receive)
        service.route("GET", "/docs", docs_page(document()))
        service.openapi(document())

        async def store_ready() -> None:
            if not store.maps.known:
                raise EtcdUnavailable("the shard map has not been read yet")
            for shard in store.maps.current.shards():
                if store.leaders.current(shard) is None:
                    raise ShardUnavailable(f"shard {shard} has no leader")

        service.check("store", store_ready)
        service.spawn(_watch(store), "watch")
        macs.start()
        budget.start()
        yield
        await in_flight.stop(STOP_S)
        await fees.stop()
        await store.stop()
        await budget.stop()
        await macs.stop()


async def _watch(store: Shards) -> None:
    """Wait for etcd as long as it takes: the readiness check tells meanwhile."""
    while True:
        try:
            await store.start(timeout_s=60)
        except EtcdUnavailable:
            continue
        return


def main() -> None:
    """The process' entry."""
    run(start, kind="router", description="The public API of payments.")
