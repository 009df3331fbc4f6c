"""`oncepay config`: secrets stay hidden, and each thing that can't stay so is named."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from cli.common import WRONG
from cli.config import config, findings, without_secrets
from oncepay.settings import EtcdSettings, FeeSettings, PatroniSettings, PostgresSettings, Settings, StripeSettings, dump

PASSWORDS = {name: f"{name}-1" for name in PostgresSettings.__struct_fields__ if name.endswith("_password")}


def good(tmp_path: Path) -> Settings:
    """Settings with nothing wrong in them."""
    (tmp_path / "whsec").write_text("whsec_1")
    return Settings(
        etcd=EtcdSettings(endpoints=("a:1", "b:1", "c:1")),
        postgres=PostgresSettings(**PASSWORDS),
        patroni=PatroniSettings(password="rest-1"),
        stripe=StripeSettings(api_key="sk_test_1", webhook_secret_files=(str(tmp_path / "whsec"),)),
        aggregator_dsn="postgresql://oncepay_aggregator:dsn-1@127.0.0.1:1/oncepay",
        internal_token="token-1",
    )


def written(tmp_path: Path, settings: Settings, mode: int = 0o600) -> Path:
    path = tmp_path / "oncepay.toml"
    path.write_bytes(dump(settings))
    path.chmod(mode)
    return path


def test_good_settings_pass(tmp_path: Path) -> None:
    path = written(tmp_path, good(tmp_path))
    assert findings(good(tmp_path), path) == []
    result = CliRunner().invoke(config, ["check", "--config", str(path), "--output", "json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"ok": True, "file": str(path), "findings": []}


def test_no_secret_is_shown(tmp_path: Path) -> None:
    settings = good(tmp_path)
    shown = without_secrets(settings)
    text = json.dumps(shown)
    for secret in (*PASSWORDS.values(), "rest-1", "sk_test_1", "dsn-1", "token-1"):
        assert secret not in text
    assert shown["postgres"]["router_password"] == "(set)"
    assert without_secrets(Settings())["internal_token"] == "(not set)"
    path = written(tmp_path, settings)
    for output in ("text", "json"):
        result = CliRunner().invoke(config, ["show", "--config", str(path), "--output", output])
        assert result.exit_code == 0, result.output
        assert "sk_test_1" not in result.output
        assert "endpoints" in result.output


def changed(settings: Settings, **members: object) -> Settings:
    return msgspec.structs.replace(settings, **members)


@pytest.mark.parametrize(
    ("members", "where"),
    [
        ({"stripe": StripeSettings(api_key="pk_live_1")}, "stripe.api_key"),
        ({"stripe": StripeSettings()}, "stripe.api_key"),
        ({"stripe": StripeSettings(api_key="sk_1", webhook_secret_files=("/nowhere/x",))}, "stripe.webhook_secret_files"),
        ({"stripe": StripeSettings(api_key="sk_1", base_url="http://stripe.example")}, "stripe.base_url"),
        ({"stripe": StripeSettings(api_key="sk_1", rate_limits_per_s={"creat": 5})}, "stripe.rate_limits_per_s"),
        ({"stripe": StripeSettings(api_key="sk_1", default_rate_limit_per_s=0)}, "stripe.default_rate_limit_per_s"),
        ({"etcd": EtcdSettings(endpoints=("a", "b:1", "c:1"))}, "etcd.endpoints"),
        ({"etcd": EtcdSettings(endpoints=("a:1", "b:1", "c:1"), cert_file="/nowhere/c")}, "etcd.cert_file"),
        ({"postgres": PostgresSettings()}, "postgres.router_password"),
        ({"internal_token": ""}, "internal_token"),
        ({"auth": False, "host": "0.0.0.0"}, "auth"),
        ({"fee": FeeSettings(basis_points=10_001)}, "fee.basis_points"),
        ({"fee": FeeSettings(fixed_minor=-1)}, "fee.fixed_minor"),
        ({"aggregator_url": "127.0.0.1:8082"}, "aggregator_url"),
    ],
)
def test_what_cannot_stay_is_named(tmp_path: Path, members: dict[str, object], where: str) -> None:
    path = written(tmp_path, changed(good(tmp_path), **members))
    result = CliRunner().invoke(config, ["check", "--config", str(path), "--output", "json"])
    assert result.exit_code == WRONG
    found = json.loads(result.stdout)["findings"]
    assert where in [each["where"] for each in found if each["level"] == "problem"]
    assert all(each["do"] for each in found)


def test_a_file_that_others_may_read(tmp_path: Path) -> None:
    path = written(tmp_path, good(tmp_path), 0o644)
    [finding] = findings(good(tmp_path), path)
    assert (finding.level, finding.where) == ("problem", "file")
    assert "chmod 600" in finding.do


def test_a_file_that_cannot_be_read_as_settings(tmp_path: Path) -> None:
    path = tmp_path / "oncepay.toml"
    path.write_text("colour = 1\n")
    result = CliRunner().invoke(config, ["check", "--config", str(path), "--output", "json"])
    assert result.exit_code == WRONG
    assert "colour" in json.loads(result.stdout)["error"]["detail"]
