"""Record what the demo model answers, token by token, for the audit of sizes and times.

Writes `tests/attack/answers.jsonl`. Asks the questions of `tests/attack/corpus.py` in an order
that mixes the topics, so that none has the engine when it is faster, and notes when each piece of
an answer left the engine, at the place where `tests/attack/replay_worker.py` gives it again.
"""

import asyncio
import contextlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import log_guard
from frames import Text
from protocol import GENERATE
from tests.attack.corpus import RECORDED, TOKENS, questions
from tests.engines import DEMO, Engine, build, call, started, user
from tools import demo_model
from worker_environment import environment

AT_ONCE = 24


async def record(engine: Engine, question: str) -> dict[str, Any]:
    """Return when each piece of an answer came, and the piece."""
    params = {"max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 0}
    run = engine.run(call(GENERATE, {"messages": user(question), "sampling_params": params}), "x")
    began_s = time.perf_counter()
    times_ms: list[float] = []
    deltas: list[str] = []
    async with contextlib.aclosing(run.batches()) as batches:  # type: ignore[type-var]
        async for batch in batches:
            times_ms.append(round(1000 * (time.perf_counter() - began_s), 1))
            deltas.append("".join(event.delta for event in batch if isinstance(event, Text)))
    await run.aclose()
    return {"times_ms": times_ms, "deltas": deltas}


async def main(loaded: Engine) -> None:
    """Record every answer, and write what there is even if the end comes early."""
    asked = list(enumerate(questions()))
    order = asked.copy()
    random.Random(5).shuffle(order)  # noqa: S311 - reproducible, not secret
    answers: dict[int, dict[str, Any]] = {}

    async def ask() -> None:
        while order:
            number, (topic, question) = order.pop()
            answer = await record(loaded, question)
            answers[number] = {"topic": topic, "question": question, **answer}
            print(f"{len(answers)} of {len(asked)}", file=sys.stderr, flush=True)

    try:
        async with started(loaded):
            await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    finally:
        lines = (json.dumps(answers[number], ensure_ascii=False) for number in sorted(answers))
        RECORDED.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    demo_model.make()
    log_guard.die_with_parent_when_forked()  # nothing of the engine outlives an end from outside
    # Two threads that wait for each other, on a machine that does something else too, stall.
    environment().update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")
    # An engine is loaded before there is an event loop.
    asyncio.run(main(build(DEMO, "demo", MAX_MODEL_LEN="1024", DTYPE="float32")))
