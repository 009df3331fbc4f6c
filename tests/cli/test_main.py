from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cli.common import UNREACHABLE, WRONG, handle_errors, output_option
from cli.main import COMMANDS, main
from oncepay.errors import EtcdUnavailable, WrongState


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("ONCEPAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ONCEPAY_PORT_BASE", raising=False)
    return CliRunner()


def test_help_imports_no_command() -> None:
    code = "import sys; from cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in sys.modules if m.startswith(('deploy', 'cli.up', 'rich', 'aiohttp', 'grpc', 'stripe'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_with_an_example_and_an_output_option(runner: CliRunner, name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.name == name
    result = runner.invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "--output" in result.output or isinstance(command, click.Group)


def test_an_unknown_command_is_wrong_usage(runner: CliRunner) -> None:
    assert runner.invoke(main, ["dance"]).exit_code == 2


def test_status_without_a_cluster(runner: CliRunner) -> None:
    result = runner.invoke(main, ["status"])
    assert result.exit_code == UNREACHABLE
    assert "oncepay up" in result.stderr
    assert result.stdout == ""


def test_status_without_a_cluster_as_json(runner: CliRunner) -> None:
    result = runner.invoke(main, ["status", "--output", "json"])
    assert result.exit_code == UNREACHABLE
    assert json.loads(result.stdout)["error"]["type"] == "local-cluster-not-running"


def test_down_without_a_cluster(runner: CliRunner) -> None:
    result = runner.invoke(main, ["down", "--output", "json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"ok": True, "was_running": False, "purged": False}


@pytest.mark.parametrize("base", ["eighty", "80", "65530", "70000", "-5", "0"])
@pytest.mark.parametrize("command", [["up"], ["demo"], ["chaos", "campaign"]], ids=" ".join)
def test_a_port_base_that_cannot_be(
    runner: CliRunner, command: list[str], base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("a cluster is started")

    monkeypatch.setattr("cli.demo.start", start)
    monkeypatch.setattr("cli.up.start_with_spinner", start)
    result = runner.invoke(main, command, env={"ONCEPAY_PORT_BASE": base})
    assert result.exit_code == 2
    assert base in result.stderr
    assert "ONCEPAY_PORT_BASE" in result.stderr
    assert not (tmp_path / "home").exists()


def test_a_webhook_secret_alone_is_wrong_usage(runner: CliRunner, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("whsec_x")
    assert runner.invoke(main, ["up", "--stripe-webhook-secret-file", str(secret)]).exit_code == 2


@pytest.mark.parametrize(("error", "code"), [(WrongState("no"), WRONG), (EtcdUnavailable("away"), UNREACHABLE)])
def test_errors_become_exit_codes(runner: CliRunner, error: Exception, code: int) -> None:
    @click.command()
    @output_option
    @handle_errors
    def command(output: str) -> None:
        raise error

    result = runner.invoke(command, ["--output", "json"])
    assert result.exit_code == code
    assert json.loads(result.stdout)["error"]["detail"] == str(error)
