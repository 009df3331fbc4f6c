"""Rebuilding what is derived from one shard, against a real Postgres."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from aggregator import apply, copying
from aggregator.copying import Fields
from aggregator.fold import fold
from aggregator.put import _Encoder
from aggregator.rebuild import EpochEnded, rebuild
from aggregator.rows import life_of
from oncepay.errors import MalformedBody
from oncepay.feed import (
    COPIED,
    REBUILD_END,
    EntryRow,
    FeedBatch,
    PaymentRow,
    RebuildHead,
    encode_batch,
    encode_copy,
    encode_head,
    framed,
)
from tests.aggregator.database import empty, expected, held
from tests.aggregator.strategies import History, histories
from tests.aggregator.test_apply import REAL, paid

pytestmark = pytest.mark.cluster
ALL = ((0, 65_535),)


def body(
    history: History,
    *,
    epoch: int = 2,
    slots: tuple[tuple[int, int], ...] = ALL,
    end: bytes = REBUILD_END,
    copied: bool = True,
) -> bytes:
    """What a worker sends of a shard's tables at the history's end: each payment as it is then, all entries and links. Without
    `copied` as workers of earlier versions do it."""
    lsn = history.lsn
    latest: dict[str, PaymentRow] = {}
    for row in history.payments:
        known = latest.get(row.key)
        terms = row.terms or (known.terms if known else None)
        latest[row.key] = replace(row, lsn=lsn, terms=terms, progress=row.progress or (known.progress if known else None))
    entries = tuple(replace(row, lsn=lsn) for row in history.entries)
    links = tuple(replace(row, lsn=lsn) for row in history.links)
    payments = tuple(latest.values())
    head = RebuildHead(history.shard, history.incarnation, epoch, lsn, slots, tuple(COPIED) if copied else ())
    usual = [row for row in payments if copied and (row.terms or "").startswith("[")]
    others = tuple(row for row in payments if row not in usual)
    whole = FeedBatch(history.shard, history.incarnation, epoch, 0, lsn, others, *(() if copied else (entries, links)))
    rows = framed(encode_batch(whole))
    if copied:
        encoder = _Encoder(history.shard)
        lives = [life_of([row], at_commit=False) for row in payments]
        rows = (
            copy("entry_rows", encoder.entries(entries))
            + copy("link_rows", encoder.links(links))
            + copy("payment_versions", encoder.lives(lives))
            + copy("payments", encoder.payments(usual))
            + rows
        )
    return framed(encode_head(head)) + rows + end


def copy(table: str, columns: list[Fields], *, tear: int = 0) -> bytes:
    """A COPY's frames: as many parts as there may be, torn wherever; `tear` bytes are missing."""
    shard, *others = columns
    written = copying.HEADER + copying.rows(len(COPIED[table]), others, shard[0]) + copying.TRAILER
    written = written[: len(written) - tear]
    number = list(COPIED).index(table)
    parts = [written[first : first + 100] for first in range(0, len(written), 100)]
    return b"".join(framed(encode_copy(number, part)) for part in (*parts, b""))


async def rebuilt(connection: asyncpg.Connection, shard: str, data: bytes) -> None:
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    stream.feed_eof()
    await rebuild(connection, shard, stream)


@REAL
@given(history=histories(prefix="k"), other=histories(shard="s1", prefix="m"), data=st.data())
async def test_a_rebuild_is_the_fold_whatever_was_there(
    aggregator_dsn: str, connection: asyncpg.Connection, history: History, other: History, data: st.DataObject
) -> None:
    """What the feed had brought of the shard ends anywhere; another shard's rows stay."""
    owner = await asyncpg.connect(aggregator_dsn)
    await empty(owner)
    await owner.close()
    until = data.draw(st.integers(10, history.lsn // 100), label="applied") * 100
    await apply.apply(connection, history.batch(1000, until))
    await apply.apply(connection, other.whole())
    keys = {row.key for row in other.payments} | {row.key for row in other.entries}
    foreign = {apply_slot(key) for key in keys}
    slots = tuple((first, last) for first, last in _without(foreign))
    await rebuilt(connection, "s0", body(history, slots=slots, copied=data.draw(st.booleans(), label="copied")))
    assert await held(connection) == expected([history, other])


def apply_slot(key: str) -> int:
    from tests.aggregator.strategies import slot_of

    return slot_of(key)


def _without(slots: set[int]) -> list[tuple[int, int]]:
    """All slots but these, as ranges."""
    found, first = [], 0
    for slot in [*sorted(slots), 65_536]:
        if slot > first:
            found.append((first, slot - 1))
        first = slot + 1
    return found


async def test_entries_that_another_shard_had_brought_count_once_for_who_owns_them_now(connection: asyncpg.Connection) -> None:
    """After a move the old owner's feed has brought them; its sums are made again without them, and keep the rest."""
    moved, stays = paid("s0", "k"), paid("s0", "stays")
    stays.payments = [replace(row, lsn=row.lsn + 1000) for row in stays.payments]
    stays.entries = [replace(row, lsn=row.lsn + 1000) for row in stays.entries]
    stays.lsn += 1000
    await apply.apply(connection, moved.whole())
    await apply.apply(connection, stays.batch(moved.lsn, stays.lsn))
    target = paid("s1", "k")
    slot = moved.entries[0].slot
    await rebuilt(connection, "s1", body(target, slots=((slot, slot),)))
    assert await held(connection) == expected([stays, target])
    sums = {row["shard"]: row["entries"] for row in await connection.fetch("select shard, entries from oncepay.kind_totals")}
    assert sums == {"s0": 1, "s1": 1}


@pytest.mark.parametrize("cut", ["end", "frame", "head"])
async def test_a_body_that_is_cut_off_changes_nothing(connection: asyncpg.Connection, cut: str) -> None:
    history = paid()
    await apply.apply(connection, history.batch(1000, 1100))
    before = await held(connection)
    whole = body(history, end=b"")
    data = {"end": whole, "frame": whole[:-10], "head": whole[:7]}[cut]
    with pytest.raises(MalformedBody):
        await rebuilt(connection, "s0", data)
    assert await held(connection) == before


async def test_a_worker_that_was_replaced_rebuilds_nothing(connection: asyncpg.Connection) -> None:
    history = paid()
    await apply.apply(connection, history.batch(1000, 1100, epoch=3))
    before = await held(connection)
    with pytest.raises(EpochEnded):
        await rebuilt(connection, "s0", body(history, epoch=2))
    assert await held(connection) == before


async def test_readers_see_the_old_until_all_is_new(aggregator_dsn: str, connection: asyncpg.Connection) -> None:
    history = paid()
    await apply.apply(connection, history.batch(1000, 1100))
    reader = await asyncpg.connect(aggregator_dsn)
    before = await held(reader)
    stream = asyncio.StreamReader()
    stream.feed_data(body(history, end=b""))
    running = asyncio.create_task(rebuild(connection, "s0", stream))

    async def waits_for_the_end() -> bool:
        """The rows are in: the transaction has written, and its session waits for the next frame."""
        return bool(
            await reader.fetchval(
                "select exists (select from pg_stat_activity where datname = current_database()"
                " and state = 'idle in transaction' and query ilike 'copy %payments%')"
            )
        )

    async with asyncio.timeout(10):
        while not await waits_for_the_end():
            await asyncio.sleep(0.01)
    assert await held(reader) == before
    stream.feed_data(REBUILD_END)
    await running
    assert await held(reader) == expected([history])
    await reader.close()


async def test_history_keeps_what_was_known_and_forgets_what_never_was(connection: asyncpg.Connection) -> None:
    """Versions past those of the tables belong to a history that was abandoned when the shard was restored."""
    history = paid()
    await apply.apply(connection, history.whole())
    restored = History("s0", "i2", lsn=500)
    restored.payments.append(replace(history.payments[0], lsn=500))
    await rebuilt(connection, "s0", body(restored))
    rows = await connection.fetch("select version, lsn::text from oncepay.payment_history where key = 'k' order by 1")
    assert [tuple(row) for row in rows] == [(1, "0/44C")]
    again = paid()
    await rebuilt(connection, "s0", body(again, epoch=3))
    rows = await connection.fetch("select version, lsn::text from oncepay.payment_history where key = 'k' order by 1")
    assert [tuple(row) for row in rows] == [(1, "0/44C"), (2, None)]


async def test_no_page_goes_through_all_of_the_history(aggregator_dsn: str, connection: asyncpg.Connection) -> None:
    """Else a rebuild takes a time by the square of how much there is."""
    known, pages, lsn = 20_000, 30, 1_000
    owner = await asyncpg.connect(aggregator_dsn)
    await empty(owner)
    await owner.execute(
        "insert into oncepay.payment_versions (key, slot, first_version, last_version, versions, shard)"
        " select 'k-' || n, 1, 1, 2, '[[1,\"accepted\",null,null,0,1],[2,\"succeeded\",null,null,0,2]]', 's0'"
        f" from generate_series(1, {known}) n"
    )
    await owner.execute("vacuum analyze oncepay.payment_versions")
    row = paid("s0", "k").payments[-1]
    data = framed(encode_head(RebuildHead("s0", "one", 2, lsn, ALL)))
    for page in range(pages):
        rows = tuple(replace(row, lsn=lsn, key=f"k-{page * 10 + n}", slot=1, version=2) for n in range(10))
        data += framed(encode_batch(FeedBatch("s0", "one", 2, 0, lsn, rows)))
    await rebuilt(connection, "s0", data + REBUILD_END)
    await connection.execute("select pg_stat_force_next_flush()")
    await connection.fetchval("select 1")
    read = await owner.fetchval("select seq_tup_read from pg_stat_user_tables where relname = 'payment_versions'")
    assert 0 < read < 10 * known
    assert await owner.fetchval("select count(*) from oncepay.payment_versions") == pages * 10  # k-0 is new
    await owner.close()


FOREIGN: dict[str, tuple[str, dict[str, Any], str]] = {
    "another shard's": ("s7", {}, "0 are of shard s0"),
    "another slot's": ("s0", {"slot": 3}, "0 are of shard s0"),
    "another position's": ("s0", {"lsn": 5}, "0 are of shard s0"),
    "an unknown account": ("s0", {"accounts": ("C", "Z"), "amounts": (1, -1), "sellers": None}, "upgrade the aggregator"),
}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("what", FOREIGN)
async def test_rows_that_no_rebuild_may_bring_change_nothing(connection: asyncpg.Connection, what: str, there: bool) -> None:
    history, (shard, changes, told) = paid(), FOREIGN[what]
    if there:
        await apply.apply(connection, history.whole())
    before = await held(connection)
    [row] = history.entries
    head = RebuildHead("s0", "i1", 2, history.lsn, ((row.slot, row.slot),), tuple(COPIED))
    rows = copy("entry_rows", _Encoder(shard).entries([replace(row, **{"lsn": history.lsn, **changes})]))
    with pytest.raises(MalformedBody, match=told):
        await rebuilt(connection, "s0", framed(encode_head(head)) + rows + REBUILD_END)
    assert await held(connection) == before


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        (copy("link_rows", [[copying.text("s0")], [copying.text("txn")]]), "can't be taken"),
        (copy("link_rows", [[copying.text("s0")], [copying.text("txn")]], tear=2), "can't be taken"),
        (framed(encode_copy(2, b"rows, in a way")) + framed(encode_copy(2)), "can't be taken"),
        (framed(encode_copy(9, copying.HEADER)), "no table"),
        (framed(encode_copy(0)[:1]), "no table"),
        (framed(encode_copy(0, copying.HEADER)) + framed(encode_copy(1, copying.HEADER)), "cut off by something else"),
        (framed(encode_copy(0, copying.HEADER)), "cut off by something else"),
        (copy("payments", _Encoder("s0").payments(())) + copy("entry_rows", _Encoder("s0").entries(())), "come after others"),
    ],
)
async def test_a_copy_that_is_none_changes_nothing(connection: asyncpg.Connection, frames: bytes, told: str) -> None:
    history = paid()
    await apply.apply(connection, history.whole())
    before = await held(connection)
    head = framed(encode_head(RebuildHead("s0", "i1", 2, history.lsn, ALL, tuple(COPIED))))
    with pytest.raises(MalformedBody, match=told):
        await rebuilt(connection, "s0", head + frames + REBUILD_END)
    assert await held(connection) == before


async def test_tables_of_a_later_version_are_refused(connection: asyncpg.Connection) -> None:
    head = framed(encode_head(RebuildHead("s0", "i1", 2, 1000, ALL, ("entry_rows", "of_later"))))
    with pytest.raises(MalformedBody, match="of_later; upgrade the aggregator"):
        await rebuilt(connection, "s0", head + REBUILD_END)


ACCOUNTS = [*(f"seller:{name}:payable" for name in ("ann", "bob", "platform")), "platform:fees", "stripe:clearing", "fx:eur"]
CODES = ["C", "E", "H", "Xeur", "F", "Fann", "Fbob", "Fplatform", "Pann", "Pbob"]
AMOUNT = st.integers(-(1 << 40), 1 << 40)
LINES = st.lists(st.tuples(st.sampled_from(ACCOUNTS), AMOUNT, st.sampled_from(["", "ann", "bob", "platform"])), max_size=6)
CODED = st.lists(st.tuples(st.sampled_from(CODES), AMOUNT, st.none()), max_size=6)


@REAL
@given(lines=LINES | CODED)
async def test_postings_are_made_as_the_fold_makes_them(
    connection: asyncpg.Connection, aggregator_dsn: str, lines: list[tuple[str, int, str | None]]
) -> None:
    """Whatever there is, in whatever order and as often as may be."""
    accounts, amounts, sellers = ([line[n] for line in lines] for n in range(3))
    coded = None in sellers
    row = EntryRow(1, 0, 1, "k", "e:1", "e", "usd", "1", tuple(accounts), tuple(amounts), None if coded else tuple(sellers), 0)  # type: ignore[arg-type]
    owner = await asyncpg.connect(aggregator_dsn)
    try:
        if coded:
            made = await owner.fetch("select * from oncepay.coded_postings_of($1, $2)", accounts, amounts)
        else:
            made = await owner.fetch("select * from oncepay.postings_of($1, $2, $3)", accounts, amounts, sellers)
    finally:
        await owner.close()
    wanted = {(p.seller, p.amount, p.total, p.fee, p.debit, p.credit, p.named) for p in fold([row]).postings}
    assert {tuple(each) for each in made} == wanted
    assert len(made) == len(wanted)


WRONG = {
    "an entry is gone": "delete from oncepay.entry_rows where key = 'k1'",
    "an entry that never was": "insert into oncepay.entry_rows"
    " select 'x', entry_id, slot, kind, currency, source, accounts, amounts, sellers,"
    " created_at, shard, lsn, balance_transaction, fee from oncepay.entry_rows where key = 'k1'",
    "other amounts": "update oncepay.entry_rows set amounts = array_reverse(amounts) where key = 'k1'",
    "a posting is gone": "delete from oncepay.seller_postings where key = 'k1'",
    "a posting twice": "insert into oncepay.seller_postings select * from oncepay.seller_postings where key = 'k1'",
    "another posting": "update oncepay.seller_postings set amount = amount + 1, debit = null where key = 'k1'",
    "an old payment": "update oncepay.payments set status = 'created', version = 1, payment_intent = null where key = 'k1'",
    "a payment is gone": "delete from oncepay.payments where key = 'k1'",
    "a link that never was": "insert into oncepay.link_rows select 'txn', key, entry_id, slot, created_at, shard, lsn"
    " from oncepay.entry_rows where key = 'k1'",
    "two payments' times exchanged": "update oncepay.payments p set created_at = o.created_at, updated_at = o.updated_at"
    " from oncepay.payments o where (p.key, o.key) in (('k1', 'k4'), ('k4', 'k1'))",
    "an amount read without its sign": "update oncepay.seller_postings set fee = fee - (1::bigint << 32)"
    " where key = 'k1' and fee > 0",
    "amounts read without their sign": "update oncepay.entry_rows"
    " set amounts = array(select case when a < 0 then a + (1::bigint << 32) else a end from unnest(amounts) a) where key = 'k1'",
    "a position of another log": "update oncepay.entry_rows set lsn = '9/0' where key = 'k1'",
    "all is right": "select 1",
}


WRITTEN: dict[str, set[str]] = {"all is right": set(), "two payments' times exchanged": {"k1", "k4"}}


@pytest.mark.parametrize("wrong", WRONG)
async def test_what_is_wrong_is_written_and_nothing_else(aggregator_dsn: str, connection: asyncpg.Connection, wrong: str) -> None:
    history = History("s0")
    for n, key in enumerate(("k1", "k2", "k3", "k4")):
        one, slot = paid("s0", key), 1 if key == "k3" else 2
        history.payments += [
            replace(row, lsn=row.lsn + history.lsn, slot=slot, created_at_us=row.created_at_us + n) for row in one.payments
        ]
        history.entries += [replace(row, lsn=row.lsn + history.lsn, slot=slot) for row in one.entries]
        history.lsn += one.lsn
    owner = await asyncpg.connect(aggregator_dsn)
    await apply.apply(connection, history.whole())
    right, places = await held(connection), await _places(owner)
    await owner.execute(WRONG[wrong])
    if wrong not in ("all is right", "a posting twice", "a position of another log"):
        assert await held(connection) != right
    await rebuilt(connection, "s0", body(history))
    assert await held(connection) == right == expected([history])
    assert not await owner.fetchval("select count(*) from oncepay.entry_rows where lsn > $1", history.lsn)
    assert await owner.fetchval("select count(*) from oncepay.seller_postings") == len(right["postings"])
    if wrong != "a posting twice":  # no key says which one is too many: all are made anew
        written = {key for _, key, _ in places - await _places(owner)}
        assert written <= WRITTEN.get(wrong, {"k1"})
    await owner.close()


async def _places(owner: asyncpg.Connection) -> set[tuple[str, str, str]]:
    """Where each row stands: another place is another row, for Postgres."""
    found = set()
    for table in ("entry_rows", "seller_postings", "link_rows", "payments", "payment_versions"):
        found |= {(table, *row) for row in await owner.fetch(f"select key, ctid::text || xmin::text from oncepay.{table}")}
    return found


async def test_slots_next_to_the_rebuilt_ones_are_left_alone(aggregator_dsn: str, connection: asyncpg.Connection) -> None:
    """They are compared together with them."""
    histories: list[History] = []
    for shard, slot in (("s1", 65), ("s0", 66), ("s1", 67)):
        history = paid(shard, f"k{slot}")
        past = sum(each.lsn for each in histories)
        history.payments = [replace(row, slot=slot, lsn=row.lsn + past) for row in history.payments]
        history.entries = [replace(row, slot=slot, lsn=row.lsn + past) for row in history.entries]
        history.lsn += past
        await apply.apply(connection, history.batch(histories[0].lsn if slot == 67 else 1000, history.lsn))
        histories.append(history)
    histories.sort(key=lambda history: history.lsn)
    owner = await asyncpg.connect(aggregator_dsn)
    right, places = await held(connection), await _places(owner)
    await owner.execute("update oncepay.payments set amount = 1 where key in ('k66')")
    await owner.execute("update oncepay.seller_postings set amount = amount + 1 where key in ('k66')")
    before = await held(connection)
    await rebuilt(connection, "s0", body(histories[1], slots=((66, 66),)))
    assert await held(connection) == right != before
    assert {key for _, key, _ in places - await _places(owner)} == {"k66"}
    await owner.close()


@pytest.mark.parametrize("there", [False, True])
async def test_a_body_with_an_entry_twice_changes_nothing(connection: asyncpg.Connection, there: bool) -> None:
    history = paid()
    if there:
        await apply.apply(connection, history.whole())
    before = await held(connection)
    history.entries *= 2
    with pytest.raises(asyncpg.UniqueViolationError):
        await rebuilt(connection, "s0", body(history))
    assert await held(connection) == before
