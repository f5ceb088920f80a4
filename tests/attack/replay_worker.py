"""The real worker but for its engine, which says again what a real one was recorded saying.

Handler, replies, pacing, job loop and SDK are the product's. The prompt of a request is the number
of an answer of `corpus.recorded()`; its pieces come in the rhythm in which they came when it was
recorded. All answers take as long as is usual, for how long one took is no secret, divided by
`AUDIT_SPEED`. How the worker is weakened stands in `AUDIT_WEAKNESS`, see `WEAKNESSES`.
"""

import asyncio
import contextlib
import json
import os
import statistics
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import config
import crypto
import job_loop
import log_guard
import replies
import rp_handler
from frames import AnswerEvent, End, Event, Head, Text
from keys import KeyRing
from protocol import Call
from tests.attack import corpus
from worker_environment import environment

WEAKNESSES = ("", "unpadded", "rhythm", "unpadded,rhythm")
"""`unpadded`: chunks are as long as what they hold. `rhythm`: the engine puts out one token at a
time in the first topic, two in the second and so on, which no engine does so plainly."""


class Answering:
    """One answer, used like an `engine.Run`."""

    usage = None

    def __init__(
        self, answer: corpus.Recorded, tokens: int, at_once: int, duration_s: float
    ) -> None:
        self._answer = answer
        as_long = duration_s / answer.times_ms[tokens - 1]
        self._times_s = [ms * as_long for ms in answer.times_ms]
        self._tokens = tokens
        self._at_once = at_once

    async def batches(self) -> AsyncIterator[list[AnswerEvent]]:
        """Yield the pieces when their time has come; the last with the end."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        events: list[AnswerEvent] = [Head(200, "generate", "")]
        for number in range(self._tokens):
            last = number == self._tokens - 1
            if delta := self._answer.deltas[number]:
                events.append(Text(0, delta))
            if (number + 1) % self._at_once and not last:
                continue
            await asyncio.sleep(began_s + self._times_s[number] - loop.time())
            if last:
                events += [Event({"index": 0, "finish_reason": "length"}), self._end()]
            yield events
            events = []

    def _end(self) -> End:
        usage = {
            "prompt_tokens": len(self._answer.question) // 4,
            "completion_tokens": self._tokens,
        }
        return End(usage, {"queue_ms": 1.0, "total_ms": 1000 * self._times_s[self._tokens - 1]})

    async def aclose(self) -> None:
        """There is nothing to stop."""


class Answers:
    """All answers, used like `model_swap.Models`."""

    routes: tuple[str, ...] = ()
    max_concurrency = 256

    def __init__(self, *, rhythm: bool, speed: float) -> None:
        self._speed = speed
        self._answers = corpus.recorded()
        self._topics = sorted({answer.topic for answer in self._answers})
        self._rhythm = rhythm

    def run(self, call: Call, *_: object) -> Answering:
        """Return the answer that is asked for by its number, as far as `max_tokens`."""
        body = json.loads(call.body)
        answer, tokens = self._answers[int(body["prompt"])], body["sampling_params"]["max_tokens"]
        usual_ms = statistics.median(each.times_ms[tokens - 1] for each in self._answers)
        at_once = self._topics.index(answer.topic) + 1 if self._rhythm else 1
        return Answering(answer, tokens, at_once, usual_ms / 1000 / self._speed)


def leave_out_padding() -> None:
    """Have every chunk sealed as long as its content, as AES-GCM would have it in other systems."""

    class Unpadded(crypto.AnswerSealer):
        def _chunk(self, payload: bytes, final: bool) -> str:
            # Sealed, nobody but the length of it looks at it.
            return "1." + os.urandom(16 + 9 + len(payload) + 16).hex()

    vars(replies)["AnswerSealer"] = Unpadded


@contextlib.asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    yield


def main() -> None:
    """Serve until the platform is gone."""
    weakness = os.environ.get("AUDIT_WEAKNESS", "")
    settings, _ = config.read(environment(), ())
    speed = float(os.environ.get("AUDIT_SPEED", "1"))
    models: Any = Answers(rhythm="rhythm" in weakness, speed=speed)
    if "unpadded" in weakness:
        leave_out_padding()
    handler = rp_handler.Handler(settings, KeyRing.parse(settings.encryption_key), models)
    log_guard.die_with_parent_when_forked()
    job_loop.run(
        job_loop.Worker(
            handler=handler.handle,
            lifespan=lifespan,
            failed=lambda: False,
            max_concurrency=handler.max_concurrency,
        )
    )


if __name__ == "__main__":
    main()
