"""Patroni's and the supervisor's configuration, and the programs that a plan is made of."""

from __future__ import annotations

import configparser
import dataclasses
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from deploy import patroni, processes, programs
from deploy.local import WrongHome, secrets, supervisor
from deploy.local.bring_up import BringUp
from deploy.local.etcd import Gateway
from deploy.local.layout import Layout, Memory
from deploy.local.parts import ALL_PARTS, Plan
from deploy.local.ports import Ports
from deploy.os_user import OsUser
from oncepay.settings import load


def make_plan(home: Path, stripe_key_file: str = "", parts: tuple[str, ...] = ALL_PARTS) -> Plan:
    layout = Layout(home)
    layout.make()
    memory = Memory(9000, ("s0", "s1"), parts, (), stripe_key_file)
    passwords = secrets.load_or_make(layout)
    ports = Ports(memory.port_base)
    settings = secrets.make_settings(layout, ports, passwords, memory)
    return Plan(layout, ports, memory.shards, parts, settings, passwords, OsUser(("unshare", "--user")))


def test_patroni_gets_the_rules_that_hold_the_promises(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    config = json.loads(patroni.render(plan.node_config("s1", "s1-2")))
    dcs = config["bootstrap"]["dcs"]
    assert (dcs["synchronous_mode"], dcs["synchronous_mode_strict"]) == ("quorum", True)
    assert dcs["primary_start_timeout"] == 0
    assert dcs["failsafe_mode"] is True
    assert dcs["slots"] == {"oncepay_feed": {"type": "logical", "database": "oncepay", "plugin": "pgoutput"}}
    assert "data-checksums" in config["bootstrap"]["initdb"]
    assert config["watchdog"]["mode"] == "required"
    assert dcs["ttl"] - config["watchdog"]["safety_margin"] == patroni.WATCHDOG_TIMEOUT_S
    assert (config["scope"], config["name"], config["namespace"]) == ("s1", "s1-2", "/oncepay/patroni/")
    assert config["postgresql"]["listen"] == "127.0.0.1:9037"
    assert config["restapi"]["listen"] == "127.0.0.1:9040"
    assert config["etcd3"]["hosts"] == ["127.0.0.1:9022", "127.0.0.1:9023", "127.0.0.1:9024"]
    assert all(rule.endswith("scram-sha-256") for rule in config["postgresql"]["pg_hba"])


class Kept:
    """etcd's gateway with one key."""

    def __init__(self, value: dict[str, object] | None) -> None:
        self.value = None if value is None else json.dumps(value)
        self.puts = 0

    def get(self, key: str) -> str | None:
        assert key == "/oncepay/patroni/s0/config"
        return self.value

    def put(self, key: str, value: str) -> None:
        assert key == "/oncepay/patroni/s0/config"
        self.value = value
        self.puts += 1


def test_a_shard_that_was_made_before_gets_the_rules_of_now(tmp_path: Path) -> None:
    """The trap: Patroni reads them from its file when the shard is made, and never again."""
    plan = make_plan(tmp_path)
    wanted = patroni.dynamic(plan.node_config("s0", "s0-1"))
    old = json.loads(json.dumps(wanted)) | {"pause": True, "failsafe_mode": False}
    del old["postgresql"]["parameters"]["checkpoint_timeout"]
    old["postgresql"]["parameters"] |= {"archive_command": "python /a/folder/that/is/gone", "work_mem": "64MB"}
    bring_up = cast(BringUp, SimpleNamespace(plan=plan))
    kept = Kept(old)
    BringUp._put_rules(bring_up, cast(Gateway, kept), "s0")
    assert kept.value is not None
    now = json.loads(kept.value)
    assert (now.pop("pause"), now["postgresql"]["parameters"].pop("work_mem")) == (True, "64MB"), "what is somebody's stays"
    assert now == json.loads(json.dumps(wanted))
    BringUp._put_rules(bring_up, cast(Gateway, kept), "s0")
    assert kept.puts == 1, "nothing is written when nothing has changed"
    nothing = Kept(None)
    BringUp._put_rules(bring_up, cast(Gateway, nothing), "s0")
    assert nothing.puts == 0, "a new shard's are Patroni's to write"


def test_rules_that_somebody_changed_are_named_with_what_rests_on_them(tmp_path: Path) -> None:
    kept = json.loads(json.dumps(patroni.dynamic(make_plan(tmp_path).node_config("s0", "s0-1"))))
    parameters = kept["postgresql"]["parameters"]
    parameters |= {"shared_buffers": "8GB", "fsync": "on", "wal_sender_timeout": "15000ms"}
    assert patroni.broken_rules(kept) == [], "sizes are no rules, and a value may be written otherwise"
    kept["synchronous_mode_strict"] = False
    parameters |= {"synchronous_commit": "local", "autovacuum_naptime": "1min"}
    del kept["failsafe_mode"]
    assert sorted(patroni.broken_rules(kept)) == [
        ("autovacuum_naptime", "1min", "15s", False),
        ("failsafe_mode", None, True, True),
        ("synchronous_commit", "local", "on", True),
        ("synchronous_mode_strict", False, True, True),
    ]
    assert all(promised for *_, promised in patroni.broken_rules({"ttl": 30})[:1])


def test_a_plan_names_its_processes_and_keeps_to_its_ports(tmp_path: Path) -> None:
    made = make_plan(tmp_path).programs()
    assert [program.name for program in made] == (
        ["etcd-1", "etcd-2", "etcd-3"]
        + [f"node-s{shard}-{n}" for shard in range(2) for n in range(1, 4)]
        + ["aggregator-db", "stripe", "tipalti", "keygen-1", "keygen-2", "router-1", "router-2"]
        + ["worker-s0-1", "worker-s0-2", "worker-s1-1", "worker-s1-2", "aggregator", "console"]
    )
    listens = {port.number for program in made for port in program.listens}
    assert min(listens) == 9000
    assert max(listens) < 9070
    own = [program.port for program in made]
    assert len(set(own)) == len(own)


def test_routers_wait_for_the_webhook_secret_only_with_a_stand_in(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("sk_test_abc\n")
    with_stand_in = {program.name: program for program in make_plan(tmp_path / "a").programs()}
    with_account = {program.name: program for program in make_plan(tmp_path / "b", str(key_file)).programs()}
    assert not with_stand_in["router-1"].autostart
    assert with_account["router-1"].autostart
    assert "stripe" not in with_account


def test_settings_are_readable_by_the_services_and_kept_from_others(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    secrets.write_settings(plan.layout, plan.settings)
    settings = load(plan.layout.settings)
    assert settings == plan.settings
    assert settings.stripe.base_url == "http://127.0.0.1:9010"
    assert settings.stripe.default_rate_limit_per_s == 1000
    for path in (plan.layout.settings, plan.layout.api_key, plan.layout.passwords):
        assert path.stat().st_mode & 0o777 == 0o600
    assert plan.layout.api_key.read_text().strip() == plan.passwords.api_key


def test_secrets_are_made_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.make()
    first = secrets.load_or_make(layout)
    assert secrets.load_or_make(layout) == first
    assert len(set(msgspec.structs.astuple(first))) == len(first.__struct_fields__)


def test_a_real_account_brings_its_own_address_and_limits(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("sk_test_abc\n")
    stripe = make_plan(tmp_path / "home", str(key_file)).settings.stripe
    assert (stripe.base_url, stripe.api_key) == ("https://api.stripe.com", "sk_test_abc")
    assert stripe.default_rate_limit_per_s == 25


def test_a_file_without_a_key_is_refused(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("hello\n")
    with pytest.raises(WrongHome, match="secret key"):
        make_plan(tmp_path / "home", str(key_file))


def test_the_supervisor_reads_what_is_written(tmp_path: Path) -> None:
    home = tmp_path / "a home with 100% spaces"
    plan = make_plan(home)
    parser = configparser.ConfigParser()
    parser.read_string(supervisor.configuration(plan.programs(), plan.layout))
    groups = {group: parser[f"group:{group}"] for group in supervisor.GROUPS}
    priorities = [int(groups[group]["priority"]) for group in ("etcd", "data", "services")]
    assert priorities == sorted(priorities)
    node = parser["program:node-s0-1"]
    assert str(home / "nodes" / "s0-1") in shlex.split(node["command"])
    assert node["autorestart"] == "true"
    assert processes.PROCESS_ENV in node["environment"]


def test_what_would_change_the_programs_is_kept_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGPASSWORD", "PATRONI_NAME", "ETCD_NAME", processes.PROCESS_ENV):
        monkeypatch.setenv(name, "x")
    variables = supervisor.environment(Layout(tmp_path))
    assert not {"PGPASSWORD", "PATRONI_NAME", "ETCD_NAME", processes.PROCESS_ENV} & set(variables)
    assert variables[processes.CLUSTER_ENV] == str(tmp_path)
    assert "127.0.0.1" in variables["no_proxy"]


@pytest.mark.parametrize(("version", "warned"), [((3, 5, 1), True), ((3, 5, 3), False), ((3, 5, 21), False), ((3, 6, 0), False)])
def test_an_old_etcd_is_warned_about(version: tuple[int, int, int], warned: bool) -> None:
    assert (programs.etcd_warning(version) is not None) is warned


def test_the_newest_postgres_is_chosen() -> None:
    assert (programs.postgres_bin() / "pg_rewind").is_file()
    assert programs.postgres_bin().parent.name == "pginstall18"


def test_all_nodes_of_a_shard_archive_into_one_folder(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    parameters = [
        json.loads(patroni.render(plan.node_config("s1", node)))["bootstrap"]["dcs"]["postgresql"]["parameters"]
        for node in ("s1-1", "s1-3")
    ]
    assert parameters[0] == parameters[1]
    assert parameters[0]["archive_mode"] == "always"
    assert str(plan.layout.backups("s1") / "wal") in parameters[0]["archive_command"]
    other = json.loads(patroni.render(plan.node_config("s0", "s0-1")))["bootstrap"]["dcs"]["postgresql"]["parameters"]
    assert other["archive_command"] != parameters[0]["archive_command"]


def test_a_restored_shard_gets_its_database_from_the_backup_and_no_worker(tmp_path: Path) -> None:
    plan = dataclasses.replace(make_plan(tmp_path), restores={"s1": {"backup": "x"}}, restored=("s1",))
    made = json.loads(patroni.render(plan.node_config("s1", "s1-2")))["bootstrap"]
    assert made["method"] == "oncepay_restore"
    assert str(plan.layout.node("s1-2") / "restore.json") in made["oncepay_restore"]["command"]
    assert "initdb" not in made
    assert "post_bootstrap" not in made
    assert "method" not in json.loads(patroni.render(plan.node_config("s0", "s0-1")))["bootstrap"]
    names = [program.name for program in plan.programs()]
    assert "worker-s0-1" in names
    assert "worker-s1-1" not in names


def test_a_shard_that_is_added_or_accepted_changes_no_running_group(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    added = supervisor.configuration(plan.programs(), plan.layout, added_shard="s1")
    assert "[group:data-s1]" in added
    assert "[group:services-s1]" in added
    accepted = supervisor.configuration(plan.programs(), plan.layout, added_shard="s1", added_groups=("services",))
    assert "[group:data-s1]" not in accepted
    assert "[group:services-s1]" in accepted
