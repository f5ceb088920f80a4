"""A worker on the real SDK that opens and seals as the real one, with an echo for an engine.

Started as a process with the variables of LocalRunpod.worker_env, `ECHO_KEYS`,
perhaps `ECHO_HPKE`, and `ECHO_FOLDER`, where it notes what happens: `runs` has a line per attempt,
`hanging` and `cancelled` one per job that hangs or was cancelled. What it does
beside echoing stands in `sampling_params.behaviour` of the sealed request.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runpod

import log_guard
from crypto import RequestOpener
from errors import Rejected, RequestError
from frames import AnswerEvent, Body, End, Event, Head, Note, Sse, Text
from hpke import HpkeKeyRing
from keys import KeyRing
from pacing import with_signs
from protocol import MAX_TTL_S, Request, SealedInput, parse_generate, parse_job_input
from replies import SealedReply, rejection

FOLDER = Path(os.environ["ECHO_FOLDER"])
OPENER = RequestOpener(
    KeyRing.parse(os.environ["ECHO_KEYS"]),
    os.environ["RUNPOD_ENDPOINT_ID"],
    max_ttl_s=MAX_TTL_S,
    hpke_keys=HpkeKeyRing.parse(hpke_keys) if (hpke_keys := os.environ.get("ECHO_HPKE")) else None,
    now=lambda: time.time() + float(os.environ.get("ECHO_CLOCK_S", "0")),
)
Said = AnswerEvent | str | dict[str, str] | None
"""Events, what is yielded as it is, and None for the death of the process."""

PLAINTEXT = "this was never sealed"


def note(name: str, line: str) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(line + "\n")


async def handle(job: dict[str, Any]) -> AsyncIterator[Any]:
    note("runs", job["id"])
    as_events = False
    try:
        parsed = parse_job_input(job["input"])
        if not isinstance(parsed, SealedInput):
            raise Rejected
        as_events = parsed.as_events
        opened = OPENER.open(parsed.sealed)
    except (Rejected, RequestError):
        for item in rejection(as_events):
            yield item
        return
    reply = SealedReply(opened.request, opened.key, as_events=as_events)
    chunks = said(opened.request, reply, job["id"])
    try:
        async for chunk in with_signs(chunks, reply.padding) if as_events else chunks:
            yield chunk
    except asyncio.CancelledError:
        note("cancelled", job["id"])
        raise


async def said(request: Request, reply: SealedReply, job_id: str) -> AsyncIterator[Any]:
    try:
        async for event in answer(request, job_id):
            if event is None:
                os._exit(9)
            elif isinstance(event, str):
                yield f"data: {event}\n\n" if reply.as_events else event
            elif isinstance(event, dict):
                yield event
            else:
                for chunk in reply.render([event]):
                    yield chunk
    except RequestError as error:
        for chunk in reply.render(
            [End(None, {}, {**error.body()["error"], "status": error.status})]
        ):
            yield chunk


async def answer(request: Request, job_id: str) -> AsyncIterator[Said]:
    OPENER.check(request)
    if request.route == "generate":
        async for event in generate(bytes(request.body), job_id):
            yield event
        return
    body = json.loads(bytes(request.body)) or {}
    if body.get("behaviour") == "limited":
        raise RequestError("too much", status=429, code="rate_limit_exceeded", retry_after_s=7)
    if request.route == "worker":
        told = {"worker": "echo", "protocol": 1, "time": time.time(), "models": ["echo"]}
        yield Head(200, "body", "application/json")
        yield Body(json.dumps(told).encode())
    elif request.route == "/v1/models":
        yield Head(200, "body", "application/json")
        yield Body(json.dumps({"object": "list", "data": [{"id": "echo"}]}).encode())
    elif request.route == "/v1/audio/transcriptions":
        yield Head(200, "body", "application/json")
        yield Body(json.dumps({"text": body}).encode())
    elif request.route != "/v1/chat/completions":
        yield Head(404, "body", "application/json")
        missing = {"message": "no such route", "type": "NotFoundError", "code": 404}
        yield Body(json.dumps({"error": missing}).encode())
    elif body.get("stream"):
        for word in body.get("notes", ()):
            yield Note(word)
        await hang_if_asked(body.get("before"), job_id)
        yield Head(200, "sse", "text/event-stream")
        for word in body["messages"][-1]["content"].split():
            chunk = {"choices": [{"index": 0, "delta": {"content": word + " "}}]}
            yield Sse(b"data: " + json.dumps(chunk, separators=(",", ":")).encode())
        await hang_if_asked(body.get("behaviour"), job_id)
        yield Sse(b"data: [DONE]")
    else:
        await hang_if_asked(body.get("behaviour"), job_id)
        yield Head(200, "body", "application/json")
        yield Body(json.dumps({"echo": body["messages"][-1]["content"]}).encode())
    yield End({"completion_tokens": 1}, {"total_ms": 1.0})


async def hang_if_asked(behaviour: str | None, job_id: str) -> None:
    if behaviour == "hang":
        note("hanging", job_id)
        await asyncio.Event().wait()


async def generate(content: bytes, job_id: str) -> AsyncIterator[Said]:
    body = parse_generate(content)
    if body.messages:
        text = " / ".join(str(message["content"]) for message in body.messages)
    else:
        text = str(body.prompt)
    params = body.sampling_params
    behaviour = params.get("behaviour", "")
    if behaviour == "too long":
        raise RequestError("the prompt is longer than the context", param="messages")
    if behaviour == "already_running":
        raise RequestError("elsewhere", status=409, code="already_running")
    for word in params.get("notes", ()):
        yield Note(word)
        await asyncio.sleep(params.get("pause_s", 0))
    await asyncio.sleep(params.get("before_s", 0))
    yield Head(200, "generate", "text/plain")
    words = text.split(" ")
    for index in range(params.get("n", 1)):
        if behaviour == "everything":
            yield Event({"index": index, "reasoning": "hmm, "})
            yield Event({"index": index, "reasoning": "yes"})
            function = {"name": "look", "arguments": '{"at":'}
            call = {"index": 0, "id": "c1", "type": "function", "function": function}
            yield Event({"index": index, "tool_calls": [call]})
            more = {"index": 0, "function": {"arguments": '"sky"}'}}
            yield Event({"index": index, "tool_calls": [more]})
            top = [{"token": "x", "token_id": 1, "logprob": -0.5}]
            yield Event({"index": index, "logprobs": [{**top[0], "top": top}]})
        for number, word in enumerate(words):
            yield Text(index, word if number == 0 else " " + word)
            await asyncio.sleep(params.get("pause_s", 0))
            if number == 2:
                if behaviour == "die":
                    marker = FOLDER / f"died-{params['name']}"
                    if not marker.exists():
                        marker.touch()
                        yield None
                await hang_if_asked(behaviour, job_id)
                if behaviour == "plaintext":
                    yield PLAINTEXT
                if behaviour == "fail":
                    yield {"error": "the worker gave up"}
        yield Event({"index": index, "finish_reason": "stop"})
    if behaviour != "no end":
        usage = {
            "prompt_tokens": 1,
            "completion_tokens": len(words),
            "total_tokens": 1 + len(words),
        }
        yield End(usage, {"queue_ms": 1.0, "first_token_ms": 2.0, "total_ms": 3.0})


if __name__ == "__main__":
    # The SDK's ping process would outlive a worker that a test kills.
    log_guard.die_with_parent_when_forked()
    runpod.serverless.start(
        {
            "handler": handle,
            "return_aggregate_stream": True,
            "concurrency_modifier": lambda current: 32,
        }
    )
