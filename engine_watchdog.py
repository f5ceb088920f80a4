"""Notices an engine whose process is alive but takes no step any more.

Owns the judgement of when that is so. Knows nothing of vLLM: it is given a question that the engine
answers between two steps, and told whether work is waiting.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

LOOKS = 20
"""Into how many looks the time is divided."""

MAX_INTERVAL_S = 5.0


async def watch(
    ask: Callable[[], Awaitable[Any]],
    busy: Callable[[], bool],
    stuck_s: float,
) -> None:
    """Return once `ask` has had no answer for `stuck_s` while the engine was `busy`.

    The time that this process did not run itself (a machine that was paused, a loop that was held
    up) does not count, so that waking up together is not taken for being stuck.
    """
    interval_s = min(MAX_INTERVAL_S, stuck_s / LOOKS)
    asked: asyncio.Future[Any] | None = None
    silent_s = 0.0
    looked_s = time.monotonic()
    try:
        while silent_s < stuck_s:
            await asyncio.sleep(interval_s)
            now_s = time.monotonic()
            passed_s, looked_s = min(now_s - looked_s, 2 * interval_s), now_s
            if asked is not None and asked.done():
                # That it is dead, which is told in another way, is an answer too.
                asked.cancelled() or asked.exception()
                asked = None
            if asked is None or not busy():
                silent_s = 0.0
            else:
                silent_s += passed_s
            if asked is None and busy():
                asked = asyncio.ensure_future(ask())
    finally:
        if asked is not None:
            asked.cancel()
