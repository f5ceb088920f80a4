"""When chunks leave: at the pace of paced mode, or beside a wait (SPEC sections 11 and 1.2).

Owns the times, and in paced mode how much each chunk holds, so that neither says
anything of the text. Knows nothing of what the bytes are or how they are sealed.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

MAX_WAITING_BYTES = 64 * 1024
"""How much may wait for its tick before the engine has to wait too."""

SIGN_AFTER_S = 0.5
SIGN_EVERY_S = 15.0
"""When, and then how often, somebody who waits for the beginning of an answer is told so."""

T = TypeVar("T")


async def with_signs(chunks: AsyncIterator[T], sign: Callable[[], Iterable[T]]) -> AsyncIterator[T]:
    """Yield `chunks`, and what `sign` returns for as long as the first of them is not there."""
    first = asyncio.ensure_future(anext(chunks))
    try:
        delay_s = SIGN_AFTER_S
        while not (await asyncio.wait({first}, timeout=delay_s))[0]:
            for chunk in sign():
                yield chunk
            delay_s = SIGN_EVERY_S
        yield first.result()
    finally:
        first.cancel()
    async for chunk in chunks:
        yield chunk


async def paced(
    payloads: AsyncIterator[bytes],
    seal: Callable[[bytes, bool], list[str]],
    interval_s: float,
    cell_payload_bytes: int,
) -> AsyncIterator[str]:
    """Yield one chunk every `interval_s` seconds until the final one has left.

    A chunk holds up to `cell_payload_bytes` of the payloads, or nothing but padding.
    """
    waiting = bytearray()
    room, ended = asyncio.Event(), asyncio.Event()
    room.set()
    failure: deque[BaseException] = deque()

    async def gather() -> None:
        try:
            async for payload in payloads:
                waiting.extend(payload)
                if len(waiting) > MAX_WAITING_BYTES:
                    room.clear()
                    await room.wait()
        except Exception as error:
            failure.append(error)
        finally:
            ended.set()

    loop = asyncio.get_running_loop()
    gathering = asyncio.create_task(gather())
    try:
        tick = loop.time()
        while True:
            tick = max(tick + interval_s, loop.time())
            await asyncio.sleep(tick - loop.time())
            payload = bytes(waiting[:cell_payload_bytes])
            del waiting[:cell_payload_bytes]
            if len(waiting) < MAX_WAITING_BYTES:
                room.set()
            if failure and not waiting and not payload:
                raise failure[0]
            final = ended.is_set() and not failure and not waiting
            for chunk in seal(payload, final):
                yield chunk
            if final:
                return
    finally:
        gathering.cancel()
