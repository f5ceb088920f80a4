"""What the front end costs per token when the model is fast: real front end, real handler,
`fake_core.py` in place of the engine's core. Prints one JSON line; `bench.py` runs it.

Measured is the process's CPU time per token, with 128 streams at 20,000 tokens/s, once with short
answers, where what each request costs shows, and once with long ones. Each chunk is taken off the
handler after a pause, as long as a POST would last. Figures are the medians of the rounds, in which
the cases take turns.
"""

import argparse
import asyncio
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
from crypto import new_request, seal_request
from keys import KeyRing, generate_key
from worker_environment import environment, prepare_libraries

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps for a while. "


Start = Callable[[int], AsyncIterator[int]]
"""Starts the stream of a number; it yields how many tokens came."""


async def measure(start: Start, streams: int) -> dict[str, float]:
    """Run `streams` streams at once; return CPU µs per token, tokens/s and chunks."""
    cpu, wall = time.process_time(), time.perf_counter()

    async def one(number: int) -> tuple[int, int]:
        counts = [count async for count in start(number)]
        return sum(counts), len(counts)

    totals = await asyncio.gather(*map(one, range(streams)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tokens = sum(tokens for tokens, _ in totals)
    return {
        "cpu_us_per_token": round(1e6 * cpu / tokens, 1),
        "tokens_per_s": round(tokens / wall),
        "chunks": sum(chunks for _, chunks in totals),
        "cores": round(cpu / wall, 2),
    }


async def run(engine: Any, args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Measure the bare engine and the handler's routes, by case and by tokens per stream."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from base_models import BaseModel
    from model_swap import Models
    from rp_handler import Handler

    keys = KeyRing.parse(generate_key())
    settings = config.Settings(endpoint_id="bench")
    models = Models([BaseModel(("bench",), lambda: engine)], engine, may_swap=False)
    await models.start()
    handler = Handler(settings, keys, models)
    message = [{"role": "user", "content": TEXT}]

    def bare(tokens: int) -> Start:
        async def start(number: int) -> AsyncIterator[int]:
            params = SamplingParams(
                max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
            )
            async for output in engine.llm.generate(TEXT, params, f"bare-{number}"):
                yield len(output.outputs[0].token_ids)

        return start

    def sealed(route: str, body: dict[str, Any], tokens: int) -> Start:
        async def start(number: int) -> AsyncIterator[int]:
            request = new_request(route, json.dumps(body).encode(), audience="bench", ttl_s=600)
            job = {
                "id": f"{route}-{number}",
                "input": {"sealed": seal_request(request, keys.first)},
            }
            count = tokens
            async for _ in handler.handle(job):
                await asyncio.sleep(args.post_s)
                yield count
                count = 0

        return start

    def native(tokens: int, stream: bool) -> Start:
        params = {"max_tokens": tokens, "ignore_eos": True}
        body = {"messages": message, "sampling_params": params, "stream": stream}
        return sealed("generate", body, tokens)

    def chat(tokens: int) -> Start:
        body = {
            "model": "bench",
            "messages": message,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
        return sealed("/v1/chat/completions", body, tokens)

    cases: dict[str, Callable[[int], Start]] = {
        "engine.generate alone": bare,
        "sealed, generate route": partial(native, stream=True),
        "sealed, /v1/chat/completions": chat,
        "sealed, generate, not streamed": partial(native, stream=False),
    }
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {}
    for _ in range(args.rounds):
        for tokens in args.tokens:
            for name, case in cases.items():
                by_tokens = rounds.setdefault(name, {}).setdefault(str(tokens), [])
                by_tokens.append(await measure(case(tokens), args.streams))
    return {
        name: {tokens: _median(figures) for tokens, figures in by_tokens.items()}
        for name, by_tokens in rounds.items()
    }


def _median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[300, 1500], help="per stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=20_000, help="tokens per second")
    parser.add_argument("--post-s", type=float, default=0.01, help="how long a POST lasts")
    args = parser.parse_args()
    prepare_libraries(environment())
    logging.getLogger("worker").setLevel(logging.WARNING)
    from transformers import AutoTokenizer

    from engine import Engine

    token_ids = AutoTokenizer.from_pretrained(args.model)(TEXT * 3)["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        addresses = {
            "input_address": f"ipc://{folder}/input",
            "output_address": f"ipc://{folder}/output",
        }
        core = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("fake_core.py")),
                *addresses.values(),
                str(args.rate),
                *map(str, token_ids),
            ]
        )
        try:
            options = {"MAX_MODEL_LEN": "2048", "ENFORCE_EAGER": "true"}
            engine = Engine(args.model, ["bench"], options, 0.95, core_addresses=addresses)
            print(json.dumps(asyncio.run(run(engine, args))))
        finally:
            core.terminate()
            core.wait()


if __name__ == "__main__":
    main()
