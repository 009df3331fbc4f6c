"""Which keys of a range have changed since its verification began: read from the giver's log, through a slot of its own."""

from __future__ import annotations

from collections.abc import Sequence

from oncepay.feed import lsn_text
from shard.mover.compare import Comparer, Key
from shard.mover.errors import StreamLost
from shard.mover.stream import Stream
from shard.mover.tables import Table
from shard.worker.pgoutput import Commit, Decoder, Insert, Update

CHANGES_AT_ONCE = 50_000

_PEEK = """
select data from pg_logical_slot_peek_binary_changes($1, null, $2, 'proto_version', '1', 'publication_names', $3)
"""


class Changes:
    """The changes of a stream's range behind the slot. Nothing is forgotten before it was compared."""

    def __init__(self, stream: Stream, tables: Sequence[Table]) -> None:
        self._stream = stream
        self._wanted = {f"oncepay.{table.name}": ("slot", "key") for table in tables} | {"oncepay.move_marks": ()}
        self.slot = f"{stream.name}_check"

    async def begin(self) -> None:
        """Begin to remember changes, unless that was begun before."""
        if not await self.there():
            await self._stream.make_slot(self.slot)

    async def there(self) -> bool:
        """Whether the slot is there: a failover may have lost it. One that has lost its log is dropped."""
        try:
            return await self._stream.slot(self.slot) is not None
        except StreamLost:
            await self._stream.drop_slot(self.slot)
            return False

    async def compare(self, comparer: Comparer) -> tuple[int, list[str]]:
        """Compare all that has changed since the last time: how many keys, and what differs. Then it is forgotten.

        What changes meanwhile is for the next time: in a busy range something always does.
        """
        end = await self._stream.giver.position()
        count, found = 0, list[str]()
        while True:
            keys, upto = await self._peek()
            if not upto:
                return count, found
            count += len(keys)
            found += await comparer.keys(sorted(keys))
            if found:
                return count, found
            await self._stream.giver.read("select pg_replication_slot_advance($1, $2::text::pg_lsn)", self.slot, lsn_text(upto))
            if upto >= end:
                return count, found

    async def _peek(self) -> tuple[set[Key], int]:
        """The keys of some transactions, and the position behind them; 0 when there are none."""
        decoder = Decoder(self._wanted)
        keys: set[Key] = set()
        upto = 0
        for row in await self._stream.giver.read(_PEEK, self.slot, CHANGES_AT_ONCE, self._stream.name):
            message = decoder.decode(row["data"])
            if isinstance(message, Commit):
                upto = message.end_lsn
            elif isinstance(message, Insert | Update) and "slot" in message.row:
                keys.add((int(message.row["slot"]), str(message.row["key"])))  # type: ignore[arg-type]
        return keys, upto
