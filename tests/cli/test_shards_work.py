"""`oncepay shards`, `config` and `doctor` on a whole cluster, as far as they change nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner

from cli.common import UNREACHABLE, WRONG
from cli.config import config
from cli.doctor import doctor
from cli.doctor.services import judge as judge_metrics
from cli.doctor.shards import judge as judge_shard
from cli.doctor.shards import judge_rules
from cli.shards import grow, shards
from cli.shards.accept import said
from cli.shards.grow import named_in
from deploy.local import Cluster
from deploy.local.supervisor import Supervisor
from deploy.members import ShardMembers, Sync
from deploy.patroni import dynamic
from oncepay.etcd import Etcd
from oncepay.moves import Move
from oncepay.shardmap import read_shards, read_takers
from shard.mover.errors import MoveRefused
from shard.mover.records import Records
from shard.store.facts import ArchiveFacts, Facts, SlotFacts, StandbyFacts
from shard.store.migrate import LATEST
from tests.deploy.test_config import make_plan


def run(cluster: Cluster, *arguments: str, command: Any = shards, code: int = 0) -> Any:
    env = {"ONCEPAY_HOME": str(cluster.home)}
    result = CliRunner().invoke(command, [*arguments, "--output", "json"], env=env)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.mark.cluster
def test_every_shard_is_listed_and_shown(cluster: Cluster) -> None:
    found = run(cluster, "list")
    by_name = {shard["name"]: shard for shard in found["shards"]}
    for shard in cluster.status().shards:
        assert [tuple(part) for part in by_name[shard.name]["ranges"]] == shard.ranges
    shown = run(cluster, "show", "s0")
    assert {node["name"] for node in shown["nodes"]} == {"s0-1", "s0-2", "s0-3"}
    assert shown["facts"]["shard"] == "s0"
    assert shown["facts"]["migration"] == LATEST
    assert "oncepay_feed" in {slot["slot"] for slot in shown["facts"]["slots"]}
    text = CliRunner().invoke(shards, ["show", "s0"], env={"ONCEPAY_HOME": str(cluster.home)})
    assert "migration" in text.output
    assert run(cluster, "show", "s99", code=WRONG)["error"]["type"] == "not-found"


@pytest.mark.cluster
def test_dry_runs_say_what_would_be_done(cluster: Cluster) -> None:
    before = run(cluster, "show", "s0")
    migrated = run(cluster, "migrate", "--dry-run")
    assert {item["shard"]: item["migrations"] for item in migrated["shards"]}["s0"] == []
    assert run(cluster, "add", "s5", "--dry-run") == {"shard": "s5", "seconds": pytest.approx(0, abs=9), "dry_run": True}
    assert run(cluster, "backup", "s0", "--dry-run")["node"].startswith("s0-")
    assert run(cluster, "add", "s0", "--dry-run", code=WRONG)["error"]["type"] == "local-cluster-home"
    refused = run(cluster, "remove", "s0", "--dry-run", code=WRONG)
    assert "move them first" in refused["error"]["detail"]
    assert (
        run(cluster, "restore", "s0", "--as", "s5", "--backup", "none", "--dry-run", code=WRONG)["error"]["type"] == "no-backup"
    )
    assert run(cluster, "compare", "s0", code=WRONG)["error"]["type"] == "wrong-state"
    after = run(cluster, "show", "s0")
    assert after["facts"]["incarnation"] == before["facts"]["incarnation"]


@pytest.mark.cluster
def test_a_shard_that_got_slots_while_the_question_stood_is_kept(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    check, seen = grow.check_removal, list[list[str]]()

    async def checked(etcd: Etcd, *arguments: Any, **options: Any) -> None:
        seen.append(await read_takers(etcd))
        if len(seen) == 1:
            return  # it owned nothing then
        move = Move(id="mtest", first=0, last=9, source="s0", target="s1")
        with pytest.raises(MoveRefused, match="being removed"):
            await Records(etcd).create(move)
        assert "s1" in await read_shards(etcd), "what it has still to tell is waited for"
        await check(etcd, *arguments, **options)

    def deleted(*_: object, **__: object) -> NoReturn:
        raise AssertionError("it is deleted")

    monkeypatch.setattr(grow, "check_removal", checked)
    monkeypatch.setattr(Supervisor, "stop", deleted)
    refused = run(cluster, "remove", "s1", "--yes", code=WRONG)
    assert "move them first" in refused["error"]["detail"]
    assert ["s1" in takers for takers in seen] == [True, False]
    assert asyncio.run(takers_of(cluster)) == seen[0]


async def takers_of(cluster: Cluster) -> list[str]:
    async with Etcd(cluster.settings.etcd) as etcd:
        return await read_takers(etcd)


@pytest.mark.cluster
def test_settings_of_the_local_cluster_are_fine(cluster: Cluster) -> None:
    assert run(cluster, "check", command=config)["ok"] is True
    shown = run(cluster, "show", command=config)
    assert cluster.settings.postgres.router_password not in json.dumps(shown)


@pytest.mark.cluster
def test_doctor_names_no_difference_between_map_schema_and_shards(cluster: Cluster) -> None:
    env = {"ONCEPAY_HOME": str(cluster.home)}
    result = CliRunner().invoke(doctor, ["--output", "json"], env=env)
    assert result.exit_code in (0, WRONG), result.output
    found = json.loads(result.stdout)
    assert found["reached"]
    words = [each["what"] for each in found["findings"] if each["level"] == "problem"]
    assert not [word for word in words if "its own table" in word or "schema" in word or "map" in word], words


def test_doctor_without_a_cluster(tmp_path: Any) -> None:
    env = {"ONCEPAY_HOME": str(tmp_path / "none"), "ONCEPAY_PORT_BASE": "2000"}
    result = CliRunner().invoke(doctor, ["--output", "json"], env=env)
    assert "oncepay up" in json.dumps(json.loads(result.stdout)["findings"])
    listed = CliRunner().invoke(shards, ["list", "--output", "json"], env=env)
    assert listed.exit_code == UNREACHABLE


def test_doctor_names_rules_of_patronis_that_somebody_changed(tmp_path: Path) -> None:
    kept = json.loads(json.dumps(dynamic(make_plan(tmp_path).node_config("s0", "s0-1"))))
    assert list(judge_rules(ShardMembers("s0", None, (), Sync(), True, kept))) == []
    kept["failsafe_mode"] = False
    kept["postgresql"]["parameters"]["autovacuum_naptime"] = "1min"
    found = list(judge_rules(ShardMembers("s0", None, (), Sync(), True, kept)))
    assert [(each.level, each.where) for each in found] == [("problem", "s0"), ("warning", "s0")]
    assert "failsafe_mode is false" in found[0].what
    assert 'autovacuum_naptime is "1min"' in found[1].what
    assert list(judge_rules(ShardMembers("s0", None, (), Sync(), True))) == [], "nobody keeps any: that is another problem"


def facts(**members: Any) -> Facts:
    """A shard with nothing wrong, but for `members`."""
    good: dict[str, Any] = {
        "shard": "s0",
        "incarnation": "i",
        "migration": LATEST,
        "ranges": [(0, 99)],
        "map_version": 1,
        "worker_epoch": 1,
        "flushed": 1,
        "in_recovery": False,
        "database_bytes": 1,
        "payments_estimate": 0,
        "synchronous_standby_names": "ANY 1 (b,c)",
        "slot_wal_limit_bytes": 2**31,
        "standbys": [StandbyFacts("b", "streaming", "quorum", 0)],
        "slots": [SlotFacts("oncepay_feed", "logical", True, "reserved", 1, 0)],
        "archive": ArchiveFacts("always", 0, None, None, 0, False, None),
        "longest_transaction_s": 0.0,
    }
    return Facts(**{**good, **members})


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({}, None),
        ({"ranges": [(0, 9), (10, 99)]}, None),
        ({"ranges": [(0, 98)]}, "its own table"),
        ({"shard": "s1"}, "says that it is s1"),
        ({"migration": LATEST - 1}, "this code needs"),
        ({"migration": LATEST + 1}, "newer"),
        ({"standbys": []}, "nothing is acknowledged"),
        ({"standbys": [StandbyFacts("b", "streaming", "async", 0)]}, "nothing is acknowledged"),
        ({"standbys": [StandbyFacts("b", "streaming", "quorum", 2**30)]}, "MiB behind"),
        ({"slots": []}, "is missing"),
        ({"slots": [SlotFacts("oncepay_feed", "logical", False, "reserved", 1, 0)]}, "nobody reads its feed"),
        ({"slots": [SlotFacts("oncepay_feed", "logical", True, "lost", 1, 0)]}, "lost its place"),
        ({"slots": [SlotFacts("oncepay_feed", "logical", True, "reserved", 1, 2**31)]}, "over half"),
        ({"archive": ArchiveFacts("always", 1, "a", "t", 1, True, "b")}, "archive of its log fails"),
        ({"archive": ArchiveFacts("off", 0, None, None, 0, None, None)}, "archive_mode is off"),
        ({"longest_transaction_s": 3600.0}, "open for 3,600 s"),
    ],
)
def test_doctor_judges_a_shard(members: dict[str, Any], words: str | None) -> None:
    found = list(judge_shard("s0", facts(**members), [(0, 99)], restored=False))
    assert [words in finding.what for finding in found] == ([True] if words else []) if words else found == []
    assert all(finding.do for finding in found)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ('oncepay_feed_halted{shard="s0"} 1\n', "halted"),
        ('oncepay_feed_halted{shard="s0"} 0\n', None),
        ('oncepay_feed_behind_seconds{shard="s0"} 90\n', "90 s behind"),
        ("oncepay_keys_available_seconds +Inf\n", None),
        ("oncepay_keys_available_seconds 12\n", "keys last for 12 s"),
        ("oncepay_keys_blocks_free 0\n", "no block"),
        ("", None),
    ],
)
def test_doctor_judges_metrics(metrics: str, words: str | None) -> None:
    found = list(judge_metrics("worker-s0-1", metrics))
    assert [words in finding.what for finding in found] == ([True] if words else []) if words else found == []


def test_what_a_restored_shard_lacks_is_said_in_one_line() -> None:
    """Each kind that holds payout runs."""
    nothing = {"missing": 0, "behind": 0}
    stripe = {"missing": 2, "behind": 1, "refunds": {"missing": 1, "behind": 0}, "disputes": {"missing": 0, "behind": 3}}
    lacks = {"stripe": stripe, "tipalti": {"missing": 4, "left_out": 5}}
    assert said(lacks) == (
        "2 payments are missing, 1 refunds are missing, of 1 payments Stripe knows more, of 3 disputes Stripe knows more, "
        "4 payouts are missing, 5 sellers' payouts weren't asked for"
    )
    assert said({"stripe": nothing | {"refunds": nothing, "disputes": nothing}, "tipalti": {"missing": 0, "left_out": 0}}) == ""


def test_a_move_that_is_not_over_holds_its_shards() -> None:
    move = {"id": "m1", "source": "s0", "target": "s2", "state": "copy"}
    assert named_in(json.dumps(move).encode(), "s2") == "copy"
    assert named_in(json.dumps(move).encode(), "s1") is None
    assert named_in(json.dumps({**move, "state": "finished"}).encode(), "s2") is None
    assert named_in(b"not json", "s2") is None
