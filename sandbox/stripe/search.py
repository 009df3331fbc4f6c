"""Search for payment intents in Stripe's query language: `metadata["k"]:"v" AND status:"succeeded"`."""

from __future__ import annotations

import re

from sandbox import ids
from sandbox.stripe import errors, model, views
from sandbox.stripe.call import Call, Result
from sandbox.stripe.forms import names
from sandbox.stripe.listing import LIMIT_DEFAULT, LIMIT_MAX
from sandbox.stripe.world import World, pair_hash

PARAMS = names("query limit page expand")
SCAN_MAX = 20_000
"""Intents, newest first, that a query without metadata looks through."""
CLAUSES_MAX = 10
_CLAUSE = re.compile(
    r"""\s*(?P<not>-)?(?P<field>metadata\[(?P<quote>["'])(?P<key>.*?)(?P=quote)\]|[a-z_]+)\s*(?P<op>:|>=|<=|>|<|=)\s*"""
    r"""(?:(?P<mark>["'])(?P<text>.*?)(?P=mark)|(?P<word>[^\s]+))\s*"""
)
_OR = re.compile(r"""\sor\s(?=(?:[^"']*["'][^"']*["'])*[^"']*$)""", re.IGNORECASE)
TEXT_FIELDS = ("status", "currency", "customer")
NUMBER_FIELDS = ("amount", "created")


class Clause:
    """One condition."""

    def __init__(self, match: re.Match[str]) -> None:
        self.negated = match["not"] is not None
        self.key = match["key"]
        self.field = "metadata" if self.key is not None else match["field"]
        self.operator = match["op"]
        text = match["text"] if match["mark"] else match["word"]
        self.value: str = text or ""
        if self.field == "metadata" or self.field in TEXT_FIELDS:
            if self.operator != ":":
                raise errors.invalid(f"Field {self.field} supports only the : operator.", param="query")
        elif self.field in NUMBER_FIELDS:
            if not self.value.lstrip("-").isdigit():
                raise errors.invalid(f"Field {self.field} needs a number.", param="query")
        else:
            raise errors.invalid(
                f"Field `{self.field}` is an unsupported search field for resource `payment_intents`.", param="query"
            )

    def holds(self, row: model.Intent) -> bool:
        """Whether `row` meets the condition."""
        return self._matches(row) != self.negated

    def _matches(self, row: model.Intent) -> bool:
        if self.field == "metadata":
            if self.value == "null" and self.key not in row.metadata:
                return True
            return row.metadata.get(self.key) == self.value
        if self.field in TEXT_FIELDS:
            return bool(getattr(row, self.field) == self.value)
        actual, wanted = int(getattr(row, self.field)), int(self.value)
        return {
            ":": actual == wanted,
            "=": actual == wanted,
            ">": actual > wanted,
            "<": actual < wanted,
            ">=": actual >= wanted,
            "<=": actual <= wanted,
        }[self.operator]


def parse(query: str) -> list[Clause]:
    """The conditions of a query, all of which must hold. 400 when it can't be read."""
    clauses: list[Clause] = []
    place = 0
    if _OR.search(query):
        raise errors.invalid("The sandbox's search knows AND only.", param="query")
    while place < len(query):
        match = _CLAUSE.match(query, place)
        if match is None or len(clauses) == CLAUSES_MAX:
            raise errors.invalid("We were unable to parse your search query.", param="query")
        clauses.append(Clause(match))
        place = match.end()
        joint = re.compile(r"and\s+", re.IGNORECASE).match(query, place)
        if joint is not None:
            place = joint.end()
    if not clauses:
        raise errors.missing_param("query")
    return clauses


def _candidates(world: World, clauses: list[Clause], high: int) -> list[model.Intent]:
    """Intents below ordinal `high` that may match, newest first."""
    for clause in clauses:
        if clause.field == "metadata" and not clause.negated and clause.value != "null":
            return world.intents.sql(
                "SELECT data FROM payment_intents WHERE ord IN (SELECT intent FROM intent_metadata WHERE pair = ?) AND ord < ? "
                "ORDER BY ord DESC LIMIT ?",
                (pair_hash(clause.key, clause.value), high, SCAN_MAX),
            )
    return world.intents.page(SCAN_MAX, high=high)


def intents(world: World, call: Call) -> Result:
    """GET /v1/payment_intents/search. Unlike Stripe's, it lags behind nothing."""
    params = call.params
    params.allow(PARAMS)
    query = params.text("query")
    if query is None:
        raise errors.missing_param("query")
    clauses = parse(query)
    asked = params.integer("limit")
    limit = LIMIT_DEFAULT if asked is None else max(1, min(LIMIT_MAX, asked))
    page = params.text("page")
    high = world.intents.newest + 1
    if page is not None:
        if not page.isdigit():
            raise errors.invalid("Invalid page.", param="page")
        high = int(page)
    found = [row for row in _candidates(world, clauses, high) if all(clause.holds(row) for clause in clauses)]
    more = len(found) > limit
    found = found[:limit]
    return {
        "object": "search_result",
        "data": [views.intent(world, row) for row in found],
        "has_more": more,
        "next_page": str(ids.ordinal(found[-1].id)) if more else None,
        "url": "/v1/payment_intents/search",
    }
