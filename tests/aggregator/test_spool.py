"""What keeps a rebuild's frames while nobody takes them."""

from __future__ import annotations

import asyncio
import os

import pytest

from aggregator.rebuild import Spool
from oncepay.errors import MalformedBody, Unavailable
from oncepay.feed import REBUILD_END, framed

FRAMES = [bytes([n % 251]) * (1 + n * 37 % 5_000) for n in range(400)]


def body(frames: list[bytes], end: bytes = REBUILD_END) -> asyncio.StreamReader:
    stream = asyncio.StreamReader()
    stream.feed_data(b"".join(map(framed, frames)) + end)
    stream.feed_eof()
    return stream


def size_of(spool: Spool) -> int:
    return os.fstat(spool._file.fileno()).st_size


async def test_a_body_is_read_to_its_end_while_nobody_takes_it() -> None:
    stream = body(FRAMES)
    async with Spool(stream) as spool:
        async with asyncio.timeout(10):
            while not stream.at_eof():
                await asyncio.sleep(0)
        assert size_of(spool) == sum(map(len, FRAMES))
        assert [await spool.frame() for _ in FRAMES] == FRAMES
        assert await spool.frame() == b""
        assert size_of(spool) == 0


async def test_what_is_taken_as_it_comes_takes_no_room() -> None:
    stream = asyncio.StreamReader()
    async with Spool(stream) as spool, asyncio.timeout(10):
        for first in range(0, len(FRAMES), 3):
            together = FRAMES[first : first + 3]
            stream.feed_data(b"".join(map(framed, together)))
            assert [await spool.frame() for _ in together] == together
            assert size_of(spool) == 0
        stream.feed_data(REBUILD_END)
        assert await spool.frame() == b""


async def test_a_body_without_its_end_is_refused_at_once() -> None:
    """Whoever takes frames has work with each, and locks."""
    stream = asyncio.StreamReader()
    async with Spool(stream) as spool, asyncio.timeout(10):
        stream.feed_data(framed(FRAMES[0]))
        assert await spool.frame() == FRAMES[0]
        stream.feed_data(framed(FRAMES[1]) + b"\0\0\0\7cut")
        stream.feed_eof()
        while not stream.at_eof():
            await asyncio.sleep(0)
        with pytest.raises(MalformedBody, match="cut off"):
            await spool.frame()


async def test_a_full_disk_is_told() -> None:
    """Also where it shows when what was written goes there, and once more at the end."""

    async def taken() -> None:
        async with Spool(body(FRAMES[:3])) as spool:
            spool._file.close()
            spool._file = open("/dev/full", "w+b")  # noqa: SIM115
            await spool.frame()

    with pytest.raises(Unavailable, match="No space left"):
        await taken()


async def test_a_directory_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(Unavailable, match="TMPDIR"):
        Spool(body(FRAMES[:3]))
