"""What all commands share: `--output`, exit codes, and which cluster is meant."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from oncepay.errors import OncepayError, Unavailable

HOME_ENV = "ONCEPAY_HOME"
PORT_BASE_ENV = "ONCEPAY_PORT_BASE"
DEFAULT_HOME = ".oncepay"

WRONG = 1
USAGE = 2
UNREACHABLE = 3
INTERRUPTED = 130

P = ParamSpec("P")
R = TypeVar("R")

output_option = click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="With json, standard output is one JSON object and nothing else.",
)


def home() -> Path:
    """The folder of the local cluster."""
    return Path(os.environ.get(HOME_ENV) or DEFAULT_HOME).absolute()


def port_base() -> int | None:
    """The first port, when one is asked for. Raises click.UsageError for one that can't be."""
    from deploy.local.ports import Ports

    text = os.environ.get(PORT_BASE_ENV)
    if not text:
        return None
    try:
        base = int(text)
    except ValueError:
        raise click.UsageError(f"{PORT_BASE_ENV} is no number: {text!r}") from None
    try:
        return Ports(base).base
    except ValueError as error:
        raise click.UsageError(f"{PORT_BASE_ENV}: {error}") from None


def fail(code: int, message: str, *, as_json: bool, slug: str = "wrong") -> None:
    """Say what is wrong, on standard error, and with `as_json` as an object on standard output too; then exit."""
    if as_json:
        click.echo(json.dumps({"ok": False, "error": {"type": slug, "detail": message}}))
    click.echo(f"oncepay: {message}", err=True)
    raise SystemExit(code)


class Refused(OncepayError):
    """A service refused."""

    slug = "refused"


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """What `oncepay.client` raises, as errors that `handle_errors` tells. Raises Refused or Unavailable."""
    from oncepay.client import Problem, Unreachable

    try:
        yield
    except Problem as problem:
        field = f" ({problem.field})" if problem.field else ""
        raise Refused(f"{problem.slug}{field}: {problem.detail or problem.title}") from problem
    except Unreachable as error:
        raise Unavailable(str(error)) from error


def handle_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn the project's errors into a message and an exit code. The command takes `output`."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        as_json = kwargs.get("output") == "json"
        try:
            return command(*args, **kwargs)
        except OncepayError as error:
            code = UNREACHABLE if isinstance(error, Unavailable) or error.slug == "local-cluster-not-running" else WRONG
            fail(code, str(error), as_json=as_json, slug=error.slug)
        except KeyboardInterrupt:
            fail(INTERRUPTED, "interrupted", as_json=as_json, slug="interrupted")
        raise AssertionError("fail() returned")

    return run
