"""One round of a benchmark, and what all benchmarks share."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

HERE = Path(__file__).resolve().parent.parent
FOLDER = HERE / "bench"

OPTIONS = {"MAX_MODEL_LEN": "2048", "ENFORCE_EAGER": "true", "ENABLE_PREFIX_CACHING": "false"}
PROMPT = "Tell me a long story about the number {}."


def say(text: str) -> None:
    """Tell a person how far it is."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


@dataclass
class Round:
    """One round: `tokens_per_s` over all requests, first tokens in ms, per request."""

    tokens_per_s: float
    first_ms: list[float]
    tokens: int
    cpu_us_per_token: float | None = None

    @classmethod
    async def measure(
        cls,
        one: Callable[[int], Awaitable[tuple[float, int]]],
        requests: int,
        concurrency: int,
    ) -> Self:
        """Run `one(number)`, which returns seconds to the first token and tokens, many times."""
        slots = asyncio.Semaphore(concurrency)

        async def limited(number: int) -> tuple[float, int]:
            async with slots:
                return await one(number)

        started = time.perf_counter()
        results = await asyncio.gather(*map(limited, range(requests)))
        wall = time.perf_counter() - started
        tokens = sum(count for _, count in results)
        return cls(tokens / wall, [1000 * first for first, _ in results], tokens)
