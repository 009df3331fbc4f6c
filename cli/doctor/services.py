"""What the processes of a local cluster say of themselves: health, and the metrics that alerts are made of."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from cli.findings import Finding

if TYPE_CHECKING:
    from deploy.local import Cluster
    from deploy.local.status import ProcessStatus

ASK_S = 2.0
SERVICES = ("router", "keygen", "worker", "aggregator", "console")


class Rule(NamedTuple):
    """A metric that may not be beyond a bound; with `below` not under it."""

    metric: str
    bound: float
    below: bool
    what: str
    do: str


RULES = (
    Rule("oncepay_feed_halted", 0, False, "the feed is halted", "runbook feed-halted"),
    Rule("oncepay_feed_behind_seconds", 60, False, "the feed is {value:,.0f} s behind", "runbook feed-lag"),
    Rule("oncepay_poll_circuit_open", 0, False, "polling pauses, because Stripe is down", "runbook stripe-down"),
    Rule(
        "oncepay_feed_contradictions_total", 0, False, "{value:.0f} entries came again with another content", "`oncepay verify`"
    ),
    Rule("oncepay_keys_available_seconds", 30, True, "keys last for {value:.0f} s only", "runbook keys-low"),
    Rule("oncepay_keys_blocks_free", 1, True, "no block of keys is free", "runbook keys-low"),
)


def look_at_services(cluster: Cluster) -> list[Finding]:
    """What is wrong with processes, and what their metrics say."""
    processes = cluster.status().processes
    with ThreadPoolExecutor(8) as pool:
        found = [finding for each in pool.map(lambda process: list(_process(cluster, process)), processes) for finding in each]
    active = {process.name for process in processes if process.name.startswith("router") and process.healthy}
    if not active and any(process.name.startswith("router") for process in processes):
        found.append(
            Finding("problem", "router", "no router is ready: no payment gets in", "see the findings above, and its log")
        )
    return found


def _process(cluster: Cluster, process: ProcessStatus) -> Iterator[Finding]:
    log = cluster.layout.log(process.name)
    if process.pid is None:
        yield Finding("problem", process.name, "doesn't run", f"the supervisor starts it again and again; its log: {log}")
        return
    ours = process.name.startswith(SERVICES) and process.name != "aggregator-db" and process.port
    if not process.healthy:
        said = _get(process.port, "/readyz")[:300] if ours and process.port else ""
        text = f"isn't ready{f': {said}' if said else ''}"
        yield Finding("problem", process.name, text, f"its log: {log}; kill pid {process.pid} if it hangs: it is started again")
    if ours and process.port:
        yield from judge(process.name, _get(process.port, "/metrics"))


def judge(name: str, metrics: str) -> Iterator[Finding]:
    """What the rules make of a process's metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            worst = min if any(rule.metric == sample.name and rule.below for rule in RULES) else max
            values[sample.name] = worst(values.get(sample.name, sample.value), sample.value)
    for rule in RULES:
        value = values.get(rule.metric)
        if value is not None and (value < rule.bound if rule.below else value > rule.bound):
            yield Finding("problem", name, rule.what.format(value=value), rule.do)


def _get(port: int, path: str) -> str:
    """The body, whatever the status; empty without an answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=ASK_S) as answer:
            return str(answer.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return str(error.read().decode(errors="replace"))
    except (OSError, ValueError):
        return ""
