"""What `oncepay demo --reshard` adds: half of a shard moves to another one in the midst of the replay."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from oncepay.moves import Move
    from oncepay.settings import Settings

BEGIN_AT = 0.25
"""The share of the purchases that are settled when the move begins."""


async def split(settings: Settings, begin: asyncio.Event, say: Callable[[str], None]) -> Move:
    """Once `begin` is set, move the upper half of the first shard to the next one, and finish. Returns the move.

    Raises what the commands of `oncepay reshard` raise.
    """
    from oncepay.etcd import Etcd
    from oncepay.moves import owned_runs
    from shard.mover.errors import MoveStopped
    from shard.mover.plan import plan
    from shard.mover.run import mover

    await begin.wait()
    async with Etcd(settings.etcd) as etcd, mover(etcd, settings) as moving:
        current = await moving.records.change_map(lambda found: found)
        source, target = current.shards()[:2]
        first, last = owned_runs(current, source)[-1]
        planned = await plan(moving, current, (first + last + 1) // 2, last, target)
        if not planned.ok:
            raise MoveStopped("; ".join(check.detail for check in planned.checks if not check.ok and check.fatal))
        name = planned.move.id
        say(f"moving slots {planned.move.first}-{planned.move.last} from {source} to {target}, while payments go on")
        await moving.run(name, "ready")
        switched = await moving.run(name, "reversible")
        say(f"handed over: {switched.rows_copied:,} rows copied, the range was held for {switched.pause_s:.3f} s")
        return await moving.run(name, "finished")
