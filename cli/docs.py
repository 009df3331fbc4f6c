"""`python -m cli.docs`: writes the parts of docs/ that the code itself knows; `--check` says whether they are up to date.

A generated part of a page stands between `<!-- generated: NAME -->` and `<!-- end -->`, and NAME is one of PARTS.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from cli import states
from oncepay.errors import OncepayError
from oncepay.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SERVICES = ("router", "keygen", "shard/store", "shard/worker", "aggregator", "oncepay")
"""Folders whose metrics are listed."""
ANSWERING = ("oncepay.service", "oncepay.etcd.errors", "oncepay.transition", "router.app", "keygen.service", "aggregator.main")
"""Modules that bring all errors which an API may answer."""
ANSWERED = ("oncepay.", "router.", "keygen.", "aggregator.", "shard.store.")
NOT_ANSWERED = frozenset(
    {
        *("settings", "client-gone", "declined", "epoch-over", "etcd-refused", "etcd-lease-not-found", "etcd-outcome-unknown"),
        *("migration-blocked", "schema-newer", "not-one-map"),
    }
)
"""Never an answer to a client: what ends a process or a connection, or is turned into the payment's failure."""

_PART = re.compile(r"(<!-- generated: (?P<name>[a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class NoSuchPart(Exception):
    """A page asks for a generated part that doesn't exist."""


def problems() -> Iterator[str]:
    """Every problem type that an API answers, from the error family."""
    for module in ANSWERING:
        importlib.import_module(module)
    known: dict[str, type[OncepayError]] = {}
    for error in sorted(_family(OncepayError), key=_order):
        if error.__module__.startswith(ANSWERED) and error.slug not in NOT_ANSWERED:
            known.setdefault(error.slug, error)
    yield "| status | type ends with | meaning | `Retry-After` |"
    yield "| --- | --- | --- | --- |"
    for slug, error in known.items():
        retry = f"{error.retry_after_s} s" if error.retry_after_s else ""
        yield f"| {error.status} | `{slug}` | {_title(error)} | {retry} |"


def _order(error: type[OncepayError]) -> tuple[int, str, str, str]:
    return error.status, error.slug, error.__module__, error.__qualname__


def _title(error: type[OncepayError]) -> str:
    return (error.__doc__ or "").strip().splitlines()[0].rstrip(".")


def _family(error: type[OncepayError]) -> set[type[OncepayError]]:
    return {error}.union(*(_family(child) for child in error.__subclasses__()))


def metrics() -> Iterator[str]:
    """Every metric that the services count, from the calls that make them."""
    yield "| metric | kind | labels | meaning | of |"
    yield "| --- | --- | --- | --- | --- |"
    for folder in SERVICES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, kind, labels, text in _metrics_of(path):
                where = "every service" if path.stem == "telemetry" else _service(folder, path)
                yield f"| `{name}` | {kind} | {labels} | {text} | {where} |"


def _service(folder: str, path: Path) -> str:
    """Which processes show the metrics of that file."""
    shared = {"shard/store": "router, worker", "shard/worker": "worker"}
    return shared.get(folder, "router, worker" if folder == "oncepay" else folder)


def _metrics_of(path: Path) -> Iterator[tuple[str, str, str, str]]:
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            continue
        kind = call.func.id.removesuffix("MetricFamily").lower()
        if kind not in {"counter", "gauge", "histogram"} or not call.args or not isinstance(call.args[0], ast.Constant):
            continue
        name, text = (str(ast.literal_eval(argument)) for argument in call.args[:2])
        given = [*call.args[2:], *(word.value for word in call.keywords if word.arg in {"labels", "labelnames"})]
        labels = ", ".join(ast.literal_eval(given[0])) if given else ""
        yield f"{name.removesuffix('_total')}_total" if kind == "counter" else name, kind, labels, text


def settings() -> Iterator[str]:
    """Every setting with its default."""
    yield "| setting | default |"
    yield "| --- | --- |"
    yield from _settings_of(Settings(), "")


def _settings_of(value: msgspec.Struct, prefix: str) -> Iterator[str]:
    for field in msgspec.structs.fields(type(value)):
        found = getattr(value, field.name)
        if isinstance(found, msgspec.Struct):
            yield from _settings_of(found, f"{prefix}{field.name}.")
        else:
            yield f"| `{prefix}{field.name}` | `{msgspec.json.encode(found).decode()}` |"


def decisions() -> Iterator[str]:
    """The decision pages, by number, with their titles."""
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        number = path.name[:4]
        yield f"- [{number}]({path.name}) {title.removeprefix(f'{number}: ')}"


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "states": states.states,
    "transitions": states.transitions,
    "problems": problems,
    "metrics": metrics,
    "settings": settings,
    "decisions": decisions,
}


def generated(page: str) -> str:
    """The page with its generated parts made anew. Raises NoSuchPart."""

    def part(match: re.Match[str]) -> str:
        make = PARTS.get(match["name"])
        if make is None:
            raise NoSuchPart(f"there is no generated part {match['name']!r}, only {', '.join(PARTS)}")
        return f"{match[1]}{chr(10).join(make()).rstrip()}\n{match[3]}"

    return _PART.sub(part, page)


def outdated() -> dict[Path, str]:
    """The pages that aren't as they would be generated now, and how they would be."""
    found = {}
    for path in sorted(DOCS.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if (new := generated(page)) != page:
            found[path] = new
    return found


def main() -> int:
    """Write, or check; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cli.docs", description="Write the generated parts of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is out of date")
    arguments = parser.parse_args()
    found = outdated()
    for path, page in found.items():
        name = path.relative_to(ROOT)
        if arguments.check:
            print(f"{name} is out of date: run `make docs`", file=sys.stderr)
        else:
            path.write_text(page, encoding="utf-8")
            print(f"{name} written")
    if not found:
        print("docs/ is up to date")
    return 1 if found and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
