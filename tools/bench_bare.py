"""The bare engine of the benchmark: `AsyncLLM.generate` with nothing around it.

Reads one JSON line per round from stdin (`concurrency`, `requests`, `tokens`) and answers each
with one JSON line. `bench.py` runs it beside the worker, so that both see the same machine.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.bench_round import OPTIONS, PROMPT, Round
from worker_environment import environment, prepare_libraries


async def rounds(engine: Any) -> None:
    """Answer rounds until stdin ends."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from protocol import GenerateBody

    await engine.start()
    print(json.dumps({"ready": True}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        params = SamplingParams(
            temperature=0,
            max_tokens=asked["tokens"],
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )

        async def one(number: int, params: SamplingParams = params) -> tuple[float, int]:
            started, first, tokens = time.perf_counter(), 0.0, 0
            body = GenerateBody(messages=[{"role": "user", "content": PROMPT.format(number)}])
            prompt = await engine.render(body)
            async for output in engine.llm.generate(prompt, params, f"bare-{started}-{number}"):
                first = first or time.perf_counter() - started
                tokens += len(output.outputs[0].token_ids)
            return first, tokens

        result = await Round.measure(one, asked["requests"], asked["concurrency"])
        print(json.dumps(result.__dict__), flush=True)
    await engine.stop()


def main() -> None:
    model = sys.argv[1]
    prepare_libraries(environment())
    from engine import Engine

    engine = Engine(model, ["bench"], OPTIONS, 0.95)
    asyncio.run(rounds(engine))


if __name__ == "__main__":
    main()
