"""The API document as one page: plain HTML and CSS, made on the server, with nothing to load."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from importlib import resources
from shlex import quote
from typing import Any
from urllib.parse import quote as quote_url

from aiohttp import web

from oncepay.service import Handler

Json = dict[str, Any]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_CSS = (resources.files("router") / "docs.css").read_text()
_CODE = re.compile(r"`([^`]+)`")
_STRONG = re.compile(r"\*\*([^*]+)\*\*")
_BODY_EXAMPLES_MAX = 4


def docs_page(document: Json) -> Handler:
    """A handler that answers with the page of an OpenAPI document."""
    page = render(document)

    async def docs(request: web.Request) -> web.Response:
        """GET /docs."""
        return web.Response(text=page, content_type="text/html", charset="utf-8", headers={"Content-Security-Policy": POLICY})

    return docs


def render(document: Json) -> str:
    """The whole page."""
    calls = [(method, path, call) for path, item in document["paths"].items() for method, call in item.items()]
    tags = [(tag, [each for each in calls if each[2]["tags"] == [tag["name"]]]) for tag in document["tags"]]
    title = escape(document["info"]["title"])
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<style>{_CSS}</style></head><body><div class="page"><nav>',
        *_navigation(document, tags),
        f"</nav><main><h1>{title}</h1>",
        *(f"<p>{_text(part)}</p>" for part in document["info"]["description"].strip().split("\n\n")),
        "<p>The examples take the API's address and a key from the environment:</p>",
        f"<pre>{escape('export ROUTER=http://127.0.0.1:8080 KEY=$(cat .oncepay/api_key)')}</pre>",
        '<p>The same as a document: <a href="openapi.json">OpenAPI 3.1</a>.</p>',
    ]
    for tag, members in tags:
        parts += [f"<h2>{_title(tag['name'])}</h2><p>{_text(tag['description'])}</p>"]
        for member in members:
            parts += _call(document, *member)
    parts += ['<h2 id="schemas">Shapes</h2>', *_schemas(document), '<h2 id="problems">Problems</h2>', *_problem_types(calls)]
    return "".join((*parts, "</main></div></body></html>\n"))


def _navigation(document: Json, tags: list[tuple[Json, list[tuple[str, str, Json]]]]) -> Iterator[str]:
    for tag, members in tags:
        yield f"<h2>{_title(tag['name'])}</h2>"
        for _, _, call in members:
            yield f'<a href="#{call["operationId"]}">{escape(call["summary"])}</a>'
    yield '<h2>Reference</h2><a href="#schemas">Shapes</a><a href="#problems">Problems</a>'


def _call(document: Json, method: str, path: str, call: Json) -> Iterator[str]:
    scope = call["security"][0]["api_key"][0] if call["security"] else "no key"
    yield f'<section class="call" id="{call["operationId"]}"><span class="scope">{escape(scope)}</span>'
    yield f"<h3>{escape(call['summary'])}</h3>"
    yield f'<div class="path"><span class="method {method}">{method.upper()}</span>{escape(path)}</div>'
    yield f"<p>{_text(call['description'])}</p>"
    if call["parameters"]:
        yield "<h4>Parameters</h4>"
        rows = [
            (
                each["name"],
                f"{each['in']}: {_kind(each['schema'])}",
                each.get("required", False),
                _described(each["schema"] | {"description": each["description"]}),
            )
            for each in call["parameters"]
        ]
        yield from _table(rows)
    examples = _body_examples(call)
    if schema := _body_schema(call):
        yield "<h4>Body</h4>" if call["requestBody"]["required"] else "<h4>Body (may be left out)</h4>"
        yield f"<p>{_link(schema)}</p>" if "$ref" in schema else f"<p>{escape(_kind(schema))}</p>"
    yield "<h4>Example</h4>"
    for name, value in list(examples.items())[:_BODY_EXAMPLES_MAX] or [("", None)]:
        yield (
            f"<pre>{escape(curl(method, path, call, value))}</pre>"
            if not name or name == next(iter(examples))
            else (f"<details><summary>{escape(name)}</summary><pre>{escape(curl(method, path, call, value))}</pre></details>")
        )
    yield "<h4>Answers</h4>"
    for status, answer in call["responses"].items():
        yield from _answer(status, answer)
    yield "</section>"


def _answer(status: str, answer: Json) -> Iterator[str]:
    headers = [name for name in answer.get("headers", {}) if name != "X-Request-Id"]
    said = f"<b>{status}</b> {_text(answer['description'])}"
    if headers:
        said += f" Headers: {', '.join(f'<code>{escape(name)}</code>' for name in headers)}."
    content: Json = next(iter(answer.get("content", {}).values()), {})
    shown = [content["example"]] if "example" in content else [each["value"] for each in content.get("examples", {}).values()]
    if not shown:
        yield f"<p>{said}</p>"
        return
    bodies = "".join(f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>" for value in shown)
    yield f"<details><summary>{said}</summary>{bodies}</details>"


def curl(method: str, path: str, call: Json, body: object = None) -> str:
    """A command line for a call with its parameters' examples; text that a shell takes as it is."""
    query, lines = [], []
    for each in call["parameters"]:
        example = str(each.get("example", ""))
        if each["in"] == "path":
            path = path.replace(f"{{{each['name']}}}", quote_url(example, safe=""))
        elif each["in"] == "header" and (each.get("required") or each["name"] == "Stripe-Signature"):
            lines.append("-H " + quote(f"{each['name']}: {example}"))
        elif each["name"] == "limit":
            query.append("limit=20")
    address = f'"$ROUTER{path}{"?" if query else ""}{"&".join(query)}"'
    first = f"curl -s {address}" if method == "get" else f"curl -s -X {method.upper()} {address}"
    if call["security"]:
        lines.insert(0, '-H "Authorization: Bearer $KEY"')
    if body is not None:
        lines += ["-H 'Content-Type: application/json'", f"-d {quote(json.dumps(body, ensure_ascii=False))}"]
    return " \\\n  ".join((first, *lines))


def _schemas(document: Json) -> Iterator[str]:
    for name, schema in document["components"]["schemas"].items():
        required = schema.get("required", [])
        yield f'<section class="call" id="schema-{name}"><h3>{escape(name)}</h3><p>{_text(schema.get("description", ""))}</p>'
        yield from _table(
            [
                (member, _kind(found), member in required, _described(found))
                for member, found in schema.get("properties", {}).items()
            ]
        )
        yield "</section>"


def _problem_types(calls: list[tuple[str, str, Json]]) -> Iterator[str]:
    """Every problem type that a call here may answer, once."""
    found: dict[tuple[int, str], str] = {}
    for _, _, call in calls:
        for status, answer in call["responses"].items():
            for slug, example in answer.get("content", {}).get("application/problem+json", {}).get("examples", {}).items():
                found[int(status), slug] = example["summary"]
    yield '<div class="scroll"><table><tr><th>status</th><th>type ends with</th><th>meaning</th></tr>'
    for (code, slug), title in sorted(found.items()):
        yield f'<tr><td>{code}</td><td class="name">{escape(slug)}</td><td>{escape(title)}</td></tr>'
    yield "</table></div>"


def _table(rows: list[tuple[str, str, bool, str]]) -> Iterator[str]:
    yield '<div class="scroll"><table>'
    for name, kind, required, text in rows:
        must = ' <span class="must" title="required">*</span>' if required else ""
        yield f'<tr><td class="name">{escape(name)}{must}</td><td class="kind">{kind}</td><td>{_text(text)}</td></tr>'
    yield "</table></div>"


def _body_schema(call: Json) -> Json:
    schema: Json = call.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    return schema


def _body_examples(call: Json) -> Json:
    examples = call.get("requestBody", {}).get("content", {}).get("application/json", {}).get("examples", {})
    return {name: example["value"] for name, example in examples.items()}


def _link(schema: Json) -> str:
    name = schema["$ref"].rsplit("/", 1)[-1]
    return f'<a href="#schema-{name}">{escape(name)}</a>'


def _kind(schema: Json) -> str:
    """A schema's type in a word, as HTML."""
    if "$ref" in schema:
        return _link(schema)
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    kind = schema.get("type", "string" if "enum" in schema else "any")
    return escape(" or ".join(kind) if isinstance(kind, list) else str(schema.get("format", kind)))


def _described(schema: Json) -> str:
    """A member's description with its limits."""
    said = [schema["description"]] if "description" in schema else []
    if "enum" in schema:
        said.append("One of " + ", ".join(f"`{each}`" for each in schema["enum"] if each is not None) + ".")
    for low, high, unit in (
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " items"),
    ):
        least, most = schema.get(low), schema.get(high)
        if least is not None and most is not None:
            said.append(f"{least:,} to {most:,}{unit}.")
        elif most is not None:
            said.append(f"At most {most:,}{unit}.")
    if schema.get("default") not in (None, "", [], {}, ()):
        said.append(f"Default `{json.dumps(schema['default'])}`.")
    return " ".join(said)


def _title(name: str) -> str:
    return escape(name[:1].upper() + name[1:])


def _text(text: str) -> str:
    """Text with `code` and **strong** as HTML."""
    return _STRONG.sub(r"<strong>\1</strong>", _CODE.sub(r"<code>\1</code>", escape(text)))
