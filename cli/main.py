"""The `oncepay` command. Each group of commands is a file of its own, and is imported only when it is called."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import click


class Entry(NamedTuple):
    """Where a command is, and its line in `oncepay --help`."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "up": Entry("cli.up", "up", "Start the local cluster."),
    "down": Entry("cli.down", "down", "Stop the local cluster; its data stays."),
    "status": Entry("cli.status", "status", "Show what runs, where, and how well."),
    "payments": Entry("cli.payments", "payments", "Look at payments, make one, give one up or back."),
    "keys": Entry("cli.keys", "keys", "Take idempotency keys, and look after their pool."),
    "payouts": Entry("cli.payouts", "payouts", "Pay sellers what they are owed, and see what became of it."),
    "apikeys": Entry("cli.apikeys", "apikeys", "Make and revoke API keys."),
    "reshard": Entry("cli.reshard", "reshard", "Move ranges of slots between shards, under load."),
    "shards": Entry("cli.shards", "shards", "Look after single shards."),
    "etcd": Entry("cli.etcd", "etcd", "Back up etcd, and restore it."),
    "config": Entry("cli.config", "config", "Show and check the settings."),
    "doctor": Entry("cli.doctor", "doctor", "Say what is wrong here, and what to do."),
    "aggregator": Entry("cli.aggregator", "aggregator", "Look after the derived data: status, rebuild."),
    "reconcile": Entry("cli.reconcile", "reconcile", "Compare Stripe's and Tipalti's books with ours, both ways."),
    "verify": Entry("cli.verify", "verify", "Check every promise from outside, row by row."),
    "chaos": Entry("cli.chaos", "chaos", "Break something on purpose, and see that nothing is lost."),
    "demo": Entry("cli.demo", "demo", "Replay 6,919 real purchases on a cluster of its own, and verify."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names, and imports one when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="oncepay", message="oncepay %(version)s")
def main() -> None:
    """Oncepay: a payment platform for marketplaces that charges once.

    \b
    Example:
      oncepay up
      oncepay status
      oncepay down

    The environment variable ONCEPAY_HOME names the folder of the local cluster (.oncepay by default), and
    ONCEPAY_PORT_BASE the first of its 70 ports (8080 by default).

    Exit codes: 0 done, 1 something is wrong and named, 2 wrong usage, 3 the cluster can't be reached.
    """


if __name__ == "__main__":
    main()
