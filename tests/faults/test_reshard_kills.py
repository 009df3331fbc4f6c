"""A sample of the kill matrix of moves; all of it is `python -m loadtest.reshard matrix`."""

from __future__ import annotations

import pytest

from deploy.local import Cluster
from loadtest.reshard.commands import Operator
from loadtest.reshard.matrix import one_cell

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(400)]

FIRST = 50_000


@pytest.mark.parametrize(
    ("step", "victim"),
    [("copy", "operator"), ("drain", "operator"), ("switch", "frozen operator"), ("fence", "source leader")],
)
async def test_a_move_survives(cluster: Cluster, step: str, victim: str) -> None:
    """It comes to its end, no buyer hears an error, every acknowledged payment is found once, and all is verified."""
    cell = await one_cell(Operator(cluster.home), step, victim, FIRST)
    assert cell.wrong == ()
    assert cell.payments > 10
    assert not cell.errors
