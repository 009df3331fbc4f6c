"""The tables that belong to slots, as the database itself tells, and the queries that a move makes of them."""

from __future__ import annotations

import msgspec

from shard.mover.errors import MoveError
from shard.mover.side import Side

_TABLES = """
select t.name, t.key_columns, t.columns, t.depth,
       array(select a.attname::text from pg_attribute a
             where a.attrelid = t.relid and a.attname like 'amount%' and a.atttypid = 'bigint'::regtype order by 1) as money,
       array(select a.attname::text from pg_attribute a
             where a.attrelid = t.relid and a.attname like 'amount%' and a.atttypid = 'bigint[]'::regtype order by 1) as postings
from oncepay.slot_tables t
order by t.depth, t.name
"""


class Table(msgspec.Struct, frozen=True):
    """A table whose primary key leads with (slot, key). `money`: its columns of minor units; `postings`: arrays of them."""

    name: str
    key_columns: tuple[str, ...]
    columns: tuple[str, ...]
    money: tuple[str, ...] = ()
    postings: tuple[str, ...] = ()

    @property
    def qualified(self) -> str:
        return f'oncepay."{self.name}"'

    @property
    def column_list(self) -> str:
        return ", ".join(f'"{column}"' for column in self.columns)

    @property
    def money_sum(self) -> str:
        """An expression: what the row `t` comes to, debits alone where there are postings."""
        parts = [f't."{column}"' for column in self.money]
        debits = '(select coalesce(sum(abs(a)), 0) from unnest(t."{}") a)'
        parts += [debits.format(column) for column in self.postings]
        return " + ".join(parts) or "0"

    def copy_out(self, first: int, last: int) -> str:
        """A query of the rows of some slots. Slots are integers, so nothing is quoted."""
        where = f"slot between {int(first)} and {int(last)}"
        return f"select {self.column_list} from {self.qualified} where {where}"  # noqa: S608


async def tables_of(side: Side) -> tuple[Table, ...]:
    """The tables of slots, those that others refer to first. Raises MoveError for a table whose key isn't (slot, key, …)."""
    found = []
    for row in await side.read(_TABLES):
        if row["key_columns"][:2] != ["slot", "key"]:
            raise MoveError(f"oncepay.{row['name']} can't be moved: its primary key doesn't lead with (slot, key)")
        found.append(Table(row["name"], *(tuple(row[name]) for name in ("key_columns", "columns", "money", "postings"))))
    return tuple(found)


async def same_tables(source: Side, target: Side) -> tuple[Table, ...]:
    """The tables of both sides. Raises MoveError when they differ: then a migration is missing on one side."""
    one, other = await tables_of(source), await tables_of(target)
    if one != other:
        raise MoveError(f"shards {source.shard} and {target.shard} have different tables: bring both to the same migration")
    return one
