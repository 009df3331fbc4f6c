"""What a shard lacks beside others, told from the rows alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.stripe_objects import IntentObject
from shard.store.compare import Row, difference, intent_difference, paired
from shard.store.restored import statements

keyed = st.dictionaries(st.tuples(st.integers(0, 3), st.text("abc", min_size=1, max_size=2)), st.integers(1, 3), max_size=12)


def rows(found: dict[tuple[int, str], int]) -> list[Row]:
    return [Row(slot, key, "created", version, None) for (slot, key), version in sorted(found.items())]


async def stream(found: Iterable[Row]) -> AsyncIterator[Row]:
    for row in found:
        yield row


@given(keyed, keyed)
async def test_rows_are_paired_by_slot_and_key(here: dict[tuple[int, str], int], there: dict[tuple[int, str], int]) -> None:
    mine, theirs = rows(here), rows(there)
    pairs = [pair async for pair in paired(stream(mine), stream(theirs))]
    assert [row for row, _ in pairs if row] == mine
    assert [row for _, row in pairs if row] == theirs
    assert all(a[:2] == b[:2] for a, b in pairs if a and b)
    assert len(pairs) == len(here.keys() | there.keys())


def test_differences() -> None:
    row = Row(1, "k", "created", 2, None)
    assert difference(row, row) is None
    assert difference(None, row) == "missing"
    assert difference(row, None) == "only_here"
    assert difference(row, row._replace(version=3)) == "older"
    assert difference(row, row._replace(version=1)) == "newer"
    assert difference(row, row._replace(status="attempted")) == "forked"


@pytest.mark.parametrize(
    ("status", "row", "what", "money"),
    [
        ("succeeded", None, "missing", True),
        ("requires_payment_method", None, "missing", False),
        ("processing", None, "missing", True),
        ("succeeded", ("created", None), "missing", True),
        ("canceled", ("created", None), None, False),
        ("succeeded", ("confirming", "pi_1"), "behind", True),
        ("canceled", ("attempted", "pi_1"), "behind", False),
        ("succeeded", ("succeeded", "pi_1"), None, True),
        ("canceled", ("failed", "pi_1"), None, False),
        ("requires_action", ("confirming", "pi_1"), None, True),
    ],
)
def test_intents(status: str, row: tuple[str, str | None] | None, what: str | None, money: bool) -> None:
    intent = IntentObject(id="pi_1", status=status, amount=5, metadata={"oncepay_key": "k"})
    found = intent_difference(intent, Row(1, "k", row[0], 1, row[1]) if row else None)
    assert (found.what if found else None) == what
    if found:
        assert (found.money, found.amount, found.key) == (money, 5, "k")


def test_only_plain_names_get_into_the_statements() -> None:
    assert "'s9'" in statements("s9", "0f")
    with pytest.raises(ValueError, match="no name"):
        statements("s9'; drop table x; --", "0f")
