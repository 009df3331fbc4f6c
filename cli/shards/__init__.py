"""`oncepay shards`: what belongs to single shards, one file a kind of work."""

from __future__ import annotations

import click

from cli.resnapshot import resnapshot
from cli.shards.accept import accept
from cli.shards.adopt import adopt
from cli.shards.backups import backup, backups, restore
from cli.shards.check_cache import check_cache
from cli.shards.compare import compare
from cli.shards.grow import add, remove
from cli.shards.look import list_shards, show
from cli.shards.planned import migrate, restart, switchover


@click.group(short_help="Look after single shards.")
def shards() -> None:
    """Look after single shards: who leads, planned work, growth, backups.

    \b
    Example:
      oncepay shards list
      oncepay shards show s0
      oncepay shards switchover s0 --dry-run
    """


COMMANDS = (
    list_shards,
    show,
    add,
    remove,
    switchover,
    restart,
    migrate,
    backup,
    backups,
    restore,
    compare,
    accept,
    adopt,
    resnapshot,
    check_cache,
)
for command in COMMANDS:
    shards.add_command(command)
