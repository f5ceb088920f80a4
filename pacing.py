"""Paced mode: one chunk of one constant size per tick (SPEC section 11).

Owns when chunks leave and how much each holds, so that neither says anything of
the text. Knows nothing of what the bytes are or how they are sealed.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

MAX_WAITING_BYTES = 64 * 1024
"""How much may wait for its tick before the engine has to wait too."""


async def paced(
    payloads: AsyncIterator[tuple[bytes, bool]],
    seal: Callable[[bytes, bool], list[str]],
    interval_s: float,
    cell_payload_bytes: int,
) -> AsyncIterator[str]:
    """Yield one chunk every `interval_s` seconds until the final one has left.

    `payloads` gives bytes and whether they are the last. A chunk holds up to
    `cell_payload_bytes` of them, or nothing but padding.
    """
    waiting = bytearray()
    room, ended = asyncio.Event(), asyncio.Event()
    room.set()
    failure: deque[BaseException] = deque()

    async def gather() -> None:
        try:
            async for payload, last in payloads:
                waiting.extend(payload)
                if last:
                    break
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
