"""Stand-ins for the tests: one shared by those that leave it as they found it, and fresh ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from stripe import StripeClient

from tests.sandbox.process import Receiver, StandIn, receiver, stripe_client


@pytest.fixture(scope="session")
def shared() -> Iterator[StandIn]:
    """One stand-in for all tests; those that set faults or make webhook endpoints ask for `calm`."""
    stand_in = StandIn("stripe").start()
    yield stand_in
    stand_in.stop()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Callable[..., StandIn]]:
    """Makes stand-ins of the test's own, with state in a file."""
    made: list[StandIn] = []

    def make(*arguments: str, name: str = "stripe") -> StandIn:
        stand_in = StandIn(name, tmp_path / f"{name}{len(made)}.sqlite", *arguments).start()
        made.append(stand_in)
        return stand_in

    yield make
    for stand_in in made:
        if stand_in.process is not None and stand_in.process.poll() is None:
            stand_in.stop()


@pytest.fixture
def calm(shared: StandIn) -> Iterator[StandIn]:
    """The shared stand-in, to set faults on and advance; afterwards it has no faults and no webhook endpoints."""
    yield shared
    shared.faults()
    shared.forget_endpoints()


@pytest.fixture(scope="session")
def shared_tipalti() -> Iterator[StandIn]:
    """One Tipalti for all tests; they use names of their own."""
    stand_in = StandIn("tipalti").start()
    yield stand_in
    stand_in.stop()


@pytest.fixture
async def client(shared: StandIn) -> AsyncIterator[StripeClient]:
    """The Stripe library against the shared stand-in."""
    async with stripe_client(shared.url) as made:
        yield made


@pytest.fixture
async def box() -> AsyncIterator[Receiver]:
    """A receiver of webhooks."""
    async with receiver() as made:
        yield made
