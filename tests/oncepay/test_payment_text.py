"""A payment's terms and progress as short texts: what is written is read again, also what earlier versions wrote."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.cart import Fee, Item, Share, shares_of
from oncepay.payment import Capture, Command, Dispute, Failure, Progress, Refund, Terms
from oncepay.payment_text import line_start, parse_progress, parse_terms, progress_text, terms_text

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
ITEMS = st.builds(Item, NAMES, st.integers(0, 10**8), st.integers(1, 100_000), TEXTS)
SHARES = st.lists(st.builds(Share, NAMES, st.integers(0, 10**8), st.integers(0, 10**6)), max_size=3).map(tuple)


@st.composite
def terms(draw: st.DrawFn) -> Terms:
    items = tuple(draw(st.lists(ITEMS, min_size=1, max_size=4)))
    agreed = shares_of(items, {}, Fee(draw(st.integers(0, 10_000)), draw(st.integers(0, 50))))
    return Terms(
        items,
        draw(st.sampled_from([agreed, draw(SHARES)])),
        draw(TEXTS),
        draw(st.sampled_from(["automatic", "manual"])),
        draw(st.sampled_from(["fail", "retry"])),
        draw(st.dictionaries(TEXTS, TEXTS, max_size=2)),
        draw(TEXTS),
        draw(TEXTS),
        draw(TEXTS),
        draw(st.booleans()),
    )


REFUNDS = st.builds(Refund, NAMES, st.integers(1, 10**8), SHARES, st.integers(0, 10**13), booked=st.lists(NAMES).map(tuple))
PROGRESS = st.builds(
    Progress,
    *(TEXTS, st.integers(0, 99), TEXTS, TEXTS, st.lists(NAMES, max_size=2).map(tuple)),
    st.none() | st.builds(Failure, NAMES, TEXTS, TEXTS),
    st.sampled_from(["", "requested", "declined", "expired"]),
    *(st.integers(-1, 10**6), TEXTS, TEXTS),
    st.none() | st.builds(Capture, st.integers(1, 9), st.integers(1, 10**6), SHARES),
    st.integers(0, 9),
    st.lists(REFUNDS, max_size=2).map(tuple),
    st.lists(st.builds(Dispute, NAMES, NAMES, st.integers(0, 10**6)), max_size=2).map(tuple),
    st.lists(st.builds(Command, NAMES, NAMES), max_size=2).map(tuple),
)


@given(terms())
def test_terms_are_read_as_they_were_written(agreed: Terms) -> None:
    assert parse_terms(terms_text(agreed)) == agreed
    assert parse_terms(msgspec.json.encode(agreed).decode()) == agreed, "as earlier versions wrote them"


@given(PROGRESS)
def test_progress_is_read_as_it_was_written(progress: Progress) -> None:
    assert parse_progress(progress_text(progress)) == progress
    assert parse_progress(msgspec.json.encode(progress).decode()) == progress, "as earlier versions wrote it"


@given(terms(), NAMES)
def test_a_seller_is_found_by_how_its_lines_begin(agreed: Terms, seller: str) -> None:
    text = terms_text(agreed)
    if text.startswith("["):
        for name in (seller, *(item.seller for item in agreed.items)):
            assert (line_start(name) in text) == (name in {item.seller for item in agreed.items})


def test_what_is_usual_is_short() -> None:
    items = (Item("s12", 3000), Item("s07", 1995))
    agreed = Terms(items, shares_of(items, {}, Fee(1000)), "2026-10-28.endive", payment_method="pm_card_visa", on_decline="fail")
    assert terms_text(agreed) == '[[["s12",3000],["s07",1995]],[300,200],"2026-10-28.endive","pm_card_visa","fail"]'
    assert progress_text(Progress()) == "[]"
    assert progress_text(Progress(attempt=1, charge="ch_1", stripe_fee=59)) == '[1,"","ch_1",59]'


@pytest.mark.parametrize("text", ["", "[", "[1]", "{}", '[[["a",5]],[],"v"]', '[[["a",5]],[1,2],"v"]'])
def test_what_is_no_terms_is_refused(text: str) -> None:
    with pytest.raises((msgspec.MsgspecError, ValueError)):
        parse_terms(text)
