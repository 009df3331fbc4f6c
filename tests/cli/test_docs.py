from __future__ import annotations

import re
from pathlib import Path

import pytest

from cli import docs, states
from oncepay.payment import Status

LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
FILE = re.compile(r"`((?:oncepay|keygen|shard|router|aggregator|sandbox|deploy|cli|loadtest|tests|docs)/[\w./*-]+)`")
PAGES = sorted([docs.ROOT / "README.md", docs.ROOT / "CONTRIBUTING.md", *docs.DOCS.rglob("*.md")])


def test_the_committed_pages_are_what_would_be_generated() -> None:
    assert sorted(docs.outdated()) == [], "run `make docs`"


def test_a_page_that_is_out_of_date_is_found_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- generated: states -->\nold\n<!-- end -->\nafter\n")
    found = docs.outdated()
    assert list(found) == [page]
    page.write_text(found[page])
    assert docs.outdated() == {}
    assert page.read_text().startswith("before\n<!-- generated: states -->\n| state |")
    assert page.read_text().endswith("<!-- end -->\nafter\n")


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(docs.NoSuchPart, match="nonsense"):
        docs.generated("<!-- generated: nonsense -->\n<!-- end -->\n")


@pytest.mark.parametrize("name", list(docs.PARTS))
def test_every_part_is_on_a_page(name: str) -> None:
    assert any(f"<!-- generated: {name} -->" in page.read_text() for page in PAGES)


def test_every_event_has_an_example_and_every_state_a_meaning() -> None:
    states.check_complete()
    rows = list(states.states())[2:]
    assert len(rows) == len(Status)
    assert not [row for row in rows if "|  |" in row]


def test_what_the_table_says_of_a_success() -> None:
    event = dict(states.EXAMPLES)["the intent is seen `succeeded`, its balance transaction posted"]
    assert states.outcome(states.example(Status.CONFIRMING), event) == ("**succeeded**", "`payment`, `stripe_fee`")
    assert states.outcome(states.example(Status.FAILED), event) == ("`contradiction`", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(docs.ROOT)))
def test_links_and_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    missing += [name for name in FILE.findall(text) if not any(docs.ROOT.glob(name.rstrip("/")))]
    assert missing == []
