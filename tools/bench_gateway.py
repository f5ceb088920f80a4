"""The gateway against the direct path: what it, the client and the seals add.

The direct path is the same worker on the same platform, asked in the clear over /run and
/stream by a few lines of httpx2. Rounds of both alternate.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import httpx2
import msgspec

from keys import generate_key
from local_runpod import LocalRunpod
from tools.bench_round import FOLDER, HERE, OPTIONS, PROMPT, Round, say

ROUTE = "/v1/chat/completions"
STREAMS = 32
FIRST_TOKEN_REQUESTS = 24
PAUSE_S = 0.3
"""Before a request whose first token is timed: long enough for the SDK to have let go of the one
before and to wait for the next, whichever path was the faster to say that it was over."""

OVER = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})


class Ask(Protocol):
    """One of the two paths: sends request `number`, returns seconds to the first text, tokens."""

    async def __call__(
        self, http: httpx2.AsyncClient, number: int, tokens: int
    ) -> tuple[float, int]: ...


def body(number: int, tokens: int) -> dict[str, Any]:
    """Return a request that is answered with exactly `tokens` tokens."""
    return {
        "model": "bench",
        "messages": [{"role": "user", "content": PROMPT.format(number)}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class Reading:
    """Finds the first text and the count of tokens in streamed events."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self.first_s = 0.0
        self.tokens = 0

    def event(self, line: str) -> None:
        """Take one `data:` line."""
        if not line.startswith("data: {"):
            return
        chunk = msgspec.json.decode(line.removeprefix("data: "))
        if not self.first_s and any(c["delta"].get("content") for c in chunk["choices"]):
            self.first_s = time.perf_counter() - self._started_s
        if chunk.get("usage"):
            self.tokens = chunk["usage"]["completion_tokens"]

    @property
    def result(self) -> tuple[float, int]:
        """Seconds to the first text, tokens."""
        return self.first_s, self.tokens


async def direct(http: httpx2.AsyncClient, number: int, tokens: int) -> tuple[float, int]:
    """Ask in the clear."""
    reading = Reading()
    job_input = {"openai_route": ROUTE, "openai_input": body(number, tokens)}
    answer = await http.post("/run", json={"input": job_input})
    job_id = answer.json()["id"]
    while True:
        read = msgspec.json.decode((await http.get(f"/stream/{job_id}")).content)
        for item in read["stream"]:
            for line in item["output"].split("\n\n"):
                reading.event(line)
        if read["status"] in OVER and not read["stream"]:
            return reading.result


async def through_gateway(http: httpx2.AsyncClient, number: int, tokens: int) -> tuple[float, int]:
    """Ask as every OpenAI client does."""
    reading = Reading()
    async with http.stream("POST", ROUTE, json=body(number, tokens)) as answer:
        async for line in answer.aiter_lines():
            reading.event(line)
    return reading.result


def measure(model: str, rounds: int, tokens: int) -> dict[str, float]:
    """Start platform, worker and gateway and return the figures."""
    key, api_key = generate_key(), "bench"
    with LocalRunpod(endpoint_id="bench", api_key=api_key) as runpod:
        say("starting a worker and the gateway")
        client = {
            "RUNPOD_ENDPOINT_ID": "bench",
            "RUNPOD_API_KEY": api_key,
            "RUNPOD_API_BASE": runpod.base_url,
            "ENCRYPTION_KEY": key,
        }
        worker = {
            **OPTIONS,
            **runpod.worker_env("bench-worker"),
            "MODELS": model,
            "ENCRYPTION_KEY": key,
            "SERVED_MODEL_NAME": "bench",
            "ALLOW_PLAINTEXT": "true",
        }
        with (
            started("rp_handler.py", worker, "gateway-worker.log"),
            started(
                "gateway.py",
                {**client, "GATEWAY_PORT": "0"},
                "gateway.log",
                stdout=subprocess.PIPE,  # nothing but its banner
            ) as gateway,
        ):
            assert gateway.stdout
            url = gateway.stdout.readline().split()[-1].removesuffix("/v1")
            straight = httpx2.AsyncClient(
                base_url=f"{runpod.base_url}/bench",
                headers={"Authorization": f"Bearer {api_key}"},
                timeout=600,
            )
            relayed = httpx2.AsyncClient(base_url=url, timeout=600)
            # The first requests wait for the worker's start.
            return asyncio.run(compare(straight, relayed, rounds, tokens))


async def rested(ask: Ask, http: httpx2.AsyncClient, number: int) -> tuple[float, int]:
    """Ask a worker that has rested, for few tokens."""
    await asyncio.sleep(PAUSE_S)
    return await ask(http, number, tokens=2)


async def compare(
    straight: httpx2.AsyncClient, relayed: httpx2.AsyncClient, rounds: int, tokens: int
) -> dict[str, float]:
    """Alternate rounds of both paths; the first of each warms."""
    paths: dict[str, tuple[httpx2.AsyncClient, Ask]] = {
        "direct": (straight, direct),
        "gateway": (relayed, through_gateway),
    }
    alone: dict[str, list[Round]] = {"direct": [], "gateway": []}
    together: dict[str, list[Round]] = {"direct": [], "gateway": []}
    async with straight, relayed:
        for number in range(rounds + 1):
            for name, (http, ask) in paths.items():
                single = await Round.measure(partial(rested, ask, http), FIRST_TOKEN_REQUESTS, 1)
                many = await Round.measure(partial(ask, http, tokens=tokens), STREAMS, STREAMS)
                assert many.tokens == STREAMS * tokens, "an answer was cut short"
                if number:
                    alone[name].append(single)
                    together[name].append(many)
                    say(
                        f"round {number}, {name}: first token after "
                        f"{statistics.median(single.first_ms):.1f} ms; "
                        f"{STREAMS} streams, {many.tokens_per_s:.1f} tok/s"
                    )
    return summary(alone, together)


def summary(alone: dict[str, list[Round]], together: dict[str, list[Round]]) -> dict[str, float]:
    """Return the figures that the table shows: medians over all requests, or over rounds."""

    def first_ms(rounds: list[Round]) -> float:
        return statistics.median(ms for one in rounds for ms in one.first_ms)

    def speed(rounds: list[Round]) -> float:
        return statistics.median(one.tokens_per_s for one in rounds)

    pairs = zip(together["direct"], together["gateway"], strict=True)
    return {
        "direct_first_ms": first_ms(alone["direct"]),
        "gateway_first_ms": first_ms(alone["gateway"]),
        "added_first_ms": first_ms(alone["gateway"]) - first_ms(alone["direct"]),
        "direct_tokens_per_s": speed(together["direct"]),
        "gateway_tokens_per_s": speed(together["gateway"]),
        "throughput_ratio": statistics.median(g.tokens_per_s / d.tokens_per_s for d, g in pairs),
    }


def table(figures: dict[str, float]) -> list[str]:
    """Return the lines of the table."""
    lines = [
        "| /v1/chat/completions, streamed | direct, in the clear | gateway, sealed | |",
        "| --- | --- | --- | --- |",
    ]
    for label, name, unit in (
        ("one stream, first token, ms", "first_ms", "{added_first_ms:+.1f}"),
        (f"{STREAMS} streams, tokens/s", "tokens_per_s", "ratio {throughput_ratio:.3f}"),
    ):
        compared = unit.format(**figures)
        cells = f"{figures[f'direct_{name}']:.1f} | {figures[f'gateway_{name}']:.1f}"
        lines.append(f"| {label} | {cells} | {compared} |")
    return lines


@contextmanager
def started(
    program: str, settings: dict[str, str], log: str, *, stdout: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a program of this project with these settings; what it prints goes to its log."""
    with (FOLDER / log).open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(HERE / program)],
            env={**os.environ, **settings},
            stdout=file if stdout is None else stdout,
            stderr=file,
            text=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()
