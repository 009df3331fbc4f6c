"""The API document says what is served: the same routes and scopes, shapes that the code's own values have, and a page of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import AsyncIterator, Iterator
from html.parser import HTMLParser
from typing import Any

import jsonschema_rs
import msgspec
import pytest
import schemathesis

from oncepay.apikeys import SCOPES
from oncepay.cart import Fee, Share
from oncepay.payment import Dispute, Failure, Key, Progress, Refund, Status
from oncepay.service import Route
from router.app import start
from router.docs import POLICY, curl, render
from router.openapi import document, examples, schemas
from router.sellers import seller_view
from router.views import dispute_view, payment_view
from shard.store.sellers import Seller
from tests.oncepay.test_service import Running, running

DOCUMENT = document()
CALLS = [(method, path, call) for path, item in DOCUMENT["paths"].items() for method, call in item.items()]
BY_ID = {call["operationId"]: (method, path, call) for method, path, call in CALLS}


@pytest.fixture
async def router() -> AsyncIterator[Running]:
    """A router that has no etcd to read."""
    async with running(start) as it:
        yield it


async def test_every_route_is_in_the_document_and_the_other_way_round(router: Running) -> None:
    documented = {
        Route(method.upper(), path, call["security"][0]["api_key"][0] if call["security"] else None)
        for method, path, call in CALLS
    }
    assert set(router.service.routes) == documented
    assert len(router.service.routes) == len(documented)
    assert (await router.call("GET", "/openapi.json"))[1] == json.loads(json.dumps(DOCUMENT))


async def test_the_page_is_served_and_loads_nothing(router: Running) -> None:
    async with router.client.get("/docs") as answer:
        page = await answer.text()
        assert (answer.status, answer.content_type) == (200, "text/html")
        assert answer.headers["Content-Security-Policy"] == POLICY
    assert page == render(DOCUMENT)


def test_the_document_is_openapi() -> None:
    schemathesis.openapi.from_dict(DOCUMENT).validate()
    assert len(BY_ID) == len(CALLS)
    assert {scope for _, _, call in CALLS for each in call["security"] for scope in each["api_key"]} == set(SCOPES)
    for _, path, call in CALLS:
        in_path = {each["name"] for each in call["parameters"] if each["in"] == "path"}
        assert in_path == {part.strip("{}") for part in path.split("/") if part.startswith("{")}


def validator(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator({**schema, "components": DOCUMENT["components"]}, validate_formats=True)


def media() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every body and answer that has a schema, by name."""
    for _, _, call in CALLS:
        for kind, content in call.get("requestBody", {}).get("content", {}).items():
            yield f"{call['operationId']} {kind}", content
        for status, answer in call["responses"].items():
            for content in answer.get("content", {}).values():
                yield f"{call['operationId']} {status}", content


@pytest.mark.parametrize("name", dict(media()))
def test_examples_have_the_shape_that_is_stated(name: str) -> None:
    content = dict(media())[name]
    shown = [example["value"] for example in content.get("examples", {}).values()]
    shown += [content["example"]] if "example" in content else []
    for value in shown:
        validator(content["schema"]).validate(value)
    if content["schema"].get("$ref"):
        assert shown


def test_parameters_examples_have_their_shape() -> None:
    for _, _, call in CALLS:
        for each in call["parameters"]:
            if "example" in each:
                validator(each["schema"]).validate(each["example"])


def test_bodies_that_are_shown_can_be_decoded() -> None:
    types = {each.__name__: each for each in schemas.BODIES}
    seen = set()
    for _, _, call in CALLS:
        for content in call.get("requestBody", {}).get("content", {}).values():
            name = content["schema"].get("$ref", "").rsplit("/", 1)[-1]
            seen.add(name)
            for example in content["examples"].values():
                msgspec.convert(example["value"], types[name])
    assert seen - {""} == set(types)


def test_problems_are_listed_under_their_status_and_waits_are_said() -> None:
    for _, _, call in CALLS:
        for status, answer in call["responses"].items():
            listed = answer.get("content", {}).get("application/problem+json", {}).get("examples", {})
            assert (int(status) >= 400) == bool(listed)
            for slug, example in listed.items():
                assert (example["value"]["status"], example["value"]["type"].rsplit("/")[-1]) == (int(status), slug)
            assert ("Retry-After" in answer["headers"]) == (status in {"429", "503"})


def test_a_payment_that_has_everything_has_what_the_document_says_and_nothing_else() -> None:
    refund = Refund("r", 1, (Share("s", 1, 0),), 1, "failed", "re_1", "duplicate", "lost_or_stolen_card")
    dispute = Dispute("du_1", "lost", 1, "fraudulent", 1)
    full = msgspec.structs.replace(
        examples._SUCCEEDED,
        status=Status.REQUIRES_ACTION,
        terms=msgspec.structs.replace(examples._SUCCEEDED.terms, after=Key("a"), metadata={"a": "b"}),
        progress=Progress(
            client_secret="x",
            next_action_url="https://example.com/3ds",
            failure=Failure("card_declined", "Declined.", "generic_decline"),
            successor="b",
            refunds=(refund,),
            disputes=(dispute,),
        ),
    )
    seller = Seller("s", "p", "usd", Fee(1), 1, 1, 1)
    shown = {
        "Payment": payment_view(full, [examples._ENTRY]),
        "Dispute": dispute_view(full, dispute),
        "Seller": seller_view(seller),
    }
    shown["Refund"] = shown["Payment"]["refunds"][0]
    shown["Entry"] = shown["Payment"]["entries"][0]
    for name, view in shown.items():
        plain = json.loads(msgspec.json.encode(view))
        validator({"$ref": f"#/components/schemas/{name}"}).validate(plain)
        assert set(plain) == set(DOCUMENT["components"]["schemas"][name]["properties"])


class Page(HTMLParser):
    """The ids, the links, the examples and whatever would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loads: list[str] = []
        self.opened: list[str] = []
        self.examples: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in {"meta"}:
            self.opened.append(tag)
        if tag == "pre":
            self.examples.append("")
        if tag in {"script", "link", "img", "iframe", "object"} or "src" in given:
            self.loads.append(tag)
        self.ids.add(given.get("id") or "")
        self.links.add(given.get("href") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.opened:
            self.examples[-1] += data


def test_the_page_has_every_call_and_links_that_lead_somewhere() -> None:
    page = Page()
    text = render(DOCUMENT)
    page.feed(text)
    assert page.loads == []
    assert "url(" not in text
    assert "@import" not in text
    assert page.opened == []
    assert set(BY_ID) <= page.ids
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert {link for link in page.links if link and not link.startswith("#")} == {"openapi.json"}
    for method, path, call in CALLS:
        assert curl(method, path, call) in page.examples or call.get("requestBody")


def test_what_is_shown_is_no_markup() -> None:
    nasty = json.loads(json.dumps(DOCUMENT).replace("b-77", "<b>&'\\\""))
    page = Page()
    page.feed(render(nasty))
    assert any("<b>&" in example for example in page.examples)


@pytest.mark.parametrize("name", BY_ID)
def test_a_shell_understands_the_examples(name: str) -> None:
    method, path, call = BY_ID[name]
    content = call.get("requestBody", {}).get("content", {}).get("application/json", {})
    bodies = [example["value"] for example in content.get("examples", {}).values()]
    for body in bodies or [None]:
        words = shlex.split(curl(method, path, call, body))
        assert words[0] == "curl"
        assert "{" not in next(word for word in words if word.startswith("$ROUTER"))
        if body is not None:
            assert json.loads(words[words.index("-d") + 1]) == body
