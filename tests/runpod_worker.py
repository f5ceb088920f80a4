"""A worker on the real SDK that yields what it is told to; the platform's own tests start it.

Its arguments: a file, where it notes what happens to each job, and its number of slots.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import runpod


def note(event: str, job: dict[str, Any]) -> None:
    """Append one line for the test to read."""
    with open(sys.argv[1], "a") as notes:
        notes.write(f"{event} {job['id']}\n")


async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
    """Yield `n` numbered copies of `text`, `delay_s` apart, or play an OpenAI server."""
    note("began", job)
    given = job["input"]
    try:
        if given.get("fail"):
            raise ValueError("told to fail")
        if "openai_route" in given:
            body = given.get("openai_input")
            if body and body.get("stream"):
                yield 'data: {"a": 1}\n\n'
                yield "data: [DONE]\n\n"
            else:
                yield {"route": given["openai_route"], "body": body}
            return
        for n in range(given.get("n", 1)):
            await asyncio.sleep(given.get("delay_s", 0))
            yield f"{n} {given.get('text', '')}"
        note("ended", job)
    except (asyncio.CancelledError, GeneratorExit):
        note("cancelled", job)
        raise


if __name__ == "__main__":
    runpod.serverless.start(
        {
            "handler": handler,
            "return_aggregate_stream": True,
            "concurrency_modifier": lambda _: int(sys.argv[2]),
        }
    )
