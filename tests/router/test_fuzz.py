"""Requests that nobody thought of, made by schemathesis out of the API document: every answer is one that the document states.

A failure prints the request as a `curl` command. The seed is fixed; the environment variable FUZZ_SEED sets another.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from deploy.local.status import Status

pytestmark = pytest.mark.cluster

SEED = os.environ.get("FUZZ_SEED", "20261125")
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("response_headers_conformance", "missing_required_header", "unsupported_method", "allow_header_conformance"),
    *("ignored_auth", "ensure_resource_availability"),
)
FORBIDDEN = "negative_data_rejection"
"""The check that what the document forbids is refused."""
RUN_S = 120
"""When a run is broken off; each takes some 10 s on an idle machine."""
CARDS = ["pm_card_visa", "pm_card_visa_chargeDeclined", "pm_card_authenticationRequired", ""]


def fuzz(status: Status, folder: Path, source: str, checks: Sequence[str], arguments: str) -> str:
    """What schemathesis says; fails when a check does."""
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", source, "--url", status.urls["router"], "--seed", SEED,
        "--header", f"Authorization: Bearer {status.api_key}", "--workers", "1",
        "--generation-database", "none", "--continue-on-failure", "--no-color",
        "--checks", ",".join(checks), *arguments.split(),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    return done.stdout


def counts(said: str) -> tuple[int, int, int]:
    """Operations selected and tested, and requests made, as schemathesis counts them."""
    selected, tested, made = (re.search(pattern, said) for pattern in (r"Selected: (\d+)", r"Tested: (\d+)", r"(\d+) generated"))
    assert selected
    assert tested
    assert made
    return int(selected[1]), int(tested[1]), int(made[1])


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The same API, with values that lead further: payments that can be charged, under keys that can be taken.

    What this forbids is not what the router forbids.
    """
    schemas = document["components"]["schemas"]
    body = schemas["PaymentBody"]["properties"]
    body["currency"] = {"type": "string", "enum": ["usd", "eur", "jpy"]}
    body["payment_method"] = {"type": "string", "enum": CARDS}
    body["after"] = {"type": "string", "pattern": f"^fuzz-{SEED}-[a-c]$"}
    for name in ("customer", "metadata", "expires_in", "off_session"):
        del body[name]
    amount = {"type": "integer", "minimum": 500, "maximum": 5000}
    item = schemas["Item"] | {"properties": {"seller": schemas["Item"]["properties"]["seller"], "amount": amount}}
    body["items"] = {"type": "array", "items": item, "minItems": 1, "maxItems": 3}
    schemas["ConfirmBody"]["properties"]["payment_method"] = {"type": "string", "enum": CARDS[:3]}
    for name in ("CaptureBody", "RefundBody"):
        schemas[name]["properties"]["amount"] = {"type": ["integer", "null"], "minimum": 1, "maximum": 900}
    for operation in (operation for item in document["paths"].values() for operation in item.values()):
        for parameter in operation["parameters"]:
            if parameter["name"] == "Idempotency-Key":
                parameter["schema"] = {"type": "string", "pattern": f"^fuzz-{SEED}-[a-z]$"}
                del parameter["example"]
            if parameter["name"] == "Prefer":
                parameter["schema"] = {"type": "string", "enum": ["wait=0", "wait=5"]}
    return document


async def test_what_the_document_allows_and_what_it_forbids(status: Status, tmp_path: Path) -> None:
    source = f"{status.urls['router']}/openapi.json"
    said = fuzz(status, tmp_path, source, (*CHECKS, FORBIDDEN), "--phases examples,coverage,fuzzing -n 8")
    selected, tested, made = counts(said)
    assert tested == selected >= 16
    assert made > 400


async def test_payments_through_their_lives(status: Status, http: aiohttp.ClientSession, tmp_path: Path) -> None:
    async with http.get("/openapi.json") as answer:
        document = narrowed(await answer.json())
    source = tmp_path / "narrowed.json"
    source.write_text(json.dumps(document))
    only = "--include-path-regex ^/v1/(payments|sellers)"
    said = fuzz(status, tmp_path, str(source), CHECKS, f"--phases fuzzing,stateful --mode positive -n 16 {only}")
    selected, tested, made = counts(said)
    assert tested == selected
    assert made > 100
