"""What leaves when: in paced mode whatever comes, and beside a wait."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

import pacing
from pacing import MAX_WAITING_BYTES, paced, with_signs

CELL = 10
TICK_S = 0.02

Payloads = AsyncIterator[bytes]


def seal(payload: bytes, final: bool) -> list[str]:
    """Stand in for encryption: the payload padded to the cell, and the flag."""
    return [f"{int(final)}{payload.decode():_<{CELL}}"]


async def collect(payloads: Payloads) -> tuple[list[str], list[float]]:
    chunks, times = [], []
    async for chunk in paced(payloads, seal, TICK_S, CELL):
        chunks.append(chunk)
        times.append(asyncio.get_running_loop().time())
    return chunks, times


async def given(*payloads: bytes) -> Payloads:
    for payload in payloads:
        yield payload


def text(chunks: list[str]) -> str:
    return "".join(chunk[1:].rstrip("_") for chunk in chunks)


async def test_every_chunk_has_one_size_and_the_last_is_final() -> None:
    chunks, _ = await collect(given(b"a", b"", b"b" * 25, b"c"))
    assert text(chunks) == "a" + "b" * 25 + "c"
    assert {len(chunk) for chunk in chunks} == {1 + CELL}
    assert [chunk[0] for chunk in chunks] == ["0"] * (len(chunks) - 1) + ["1"]


async def test_chunks_leave_on_the_tick_also_with_nothing_to_say() -> None:
    async def slow() -> Payloads:
        yield b"a"
        await asyncio.sleep(10 * TICK_S)
        yield b"b"

    chunks, times = await collect(slow())
    assert text(chunks) == "ab"
    assert len(chunks) >= 8
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # Never early; late only as far as the machine is busy.
    assert min(gaps) > 0.5 * TICK_S
    assert sorted(gaps)[len(gaps) // 2] < 2 * TICK_S


async def test_a_burst_and_a_trickle_look_alike() -> None:
    async def trickle() -> Payloads:
        for _ in range(8):
            yield b"x"
            await asyncio.sleep(TICK_S / 2)

    burst, _ = await collect(given(b"x" * 4 * CELL))
    drip, _ = await collect(trickle())
    assert {len(chunk) for chunk in burst} == {len(chunk) for chunk in drip}
    assert len(burst) == 4


async def test_the_producer_waits_when_too_much_waits() -> None:
    produced = 0

    async def flood() -> Payloads:
        nonlocal produced
        for _ in range(100):
            produced += 1
            yield b"x" * (MAX_WAITING_BYTES // 4)

    async with contextlib.aclosing(paced(flood(), seal, TICK_S, CELL)) as chunks:  # type: ignore[type-var]
        for _ in range(3):
            await anext(chunks)
        assert produced <= 6


async def test_a_failure_comes_after_what_was_said_before_it() -> None:
    async def fails() -> Payloads:
        yield b"a" * 15
        raise ValueError("told to fail")

    chunks = []
    with pytest.raises(ValueError, match="told to fail"):
        async for chunk in paced(fails(), seal, TICK_S, CELL):
            chunks.append(chunk)
    assert text(chunks) == "a" * 15
    assert all(chunk[0] == "0" for chunk in chunks)


async def test_leaving_early_ends_the_producer() -> None:
    ended = asyncio.Event()

    async def endless() -> Payloads:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(TICK_S)
        finally:
            ended.set()

    async with contextlib.aclosing(paced(endless(), seal, TICK_S, CELL)) as chunks:  # type: ignore[type-var]
        await anext(chunks)
    await asyncio.wait_for(ended.wait(), 5)


async def test_signs_are_given_until_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "SIGN_AFTER_S", TICK_S)
    monkeypatch.setattr(pacing, "SIGN_EVERY_S", 2 * TICK_S)
    ready = asyncio.Event()

    async def slow() -> AsyncIterator[str]:
        await ready.wait()
        yield "first"
        await asyncio.sleep(5 * TICK_S)
        yield "second"

    said: list[str] = []
    async for chunk in with_signs(slow(), lambda: ["sign"]):
        said.append(chunk)
        if len(said) == 3:
            ready.set()
    assert said == ["sign", "sign", "sign", "first", "second"]


async def test_who_says_something_soon_gives_no_sign() -> None:
    async def quick() -> AsyncIterator[str]:
        yield "a"
        yield "b"

    assert [chunk async for chunk in with_signs(quick(), lambda: ["sign"])] == ["a", "b"]


@pytest.mark.parametrize("signs", [0, 1])
async def test_leaving_while_there_are_signs_ends_the_producer(
    signs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "SIGN_AFTER_S", TICK_S if signs else 60)
    begun, ended = asyncio.Event(), asyncio.Event()

    async def silent() -> AsyncIterator[str]:
        try:
            begun.set()
            await asyncio.Event().wait()
            yield ""
        finally:
            ended.set()

    async def read() -> None:
        async for _ in with_signs(silent(), lambda: ["sign"]):
            left.set()

    left = asyncio.Event()
    reading = asyncio.create_task(read())
    await asyncio.wait_for((left if signs else begun).wait(), 5)
    reading.cancel()
    await asyncio.wait_for(ended.wait(), 5)


async def test_a_failure_before_the_first_chunk_is_the_readers() -> None:
    async def fails() -> AsyncIterator[str]:
        raise ValueError("told to fail")
        yield ""

    with pytest.raises(ValueError, match="told to fail"):
        await anext(with_signs(fails(), lambda: ["sign"]))
