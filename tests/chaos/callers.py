"""The callers of a run: everything that the client's library offers, one way of asking each.

A caller returns the text that the client presented as the whole answer, or raises what the
client raised. `Left` says that it went away on purpose.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from answers import Answer, Progress
from client import AsyncClient, Client, ClientSettings
from local_runpod_faults import Faults
from tests.chaos.ledger import Job
from tests.chaos.questions import Question

EXECUTION_TIMEOUT_S = 60.0
"""What the platform gives a job whose last word it has lost."""


LONG = 1500
"""Tokens of an answer that nobody waits for: work for many seconds, if it went on."""


class Left(Exception):
    """The caller went away before the end, as it meant to."""


@dataclass
class Callers:
    """The clients of one run, and the platform's faults, for those that a caller brings itself."""

    polled: AsyncClient
    openai: AsyncClient
    blocking: Client
    model: str
    faults: Faults

    @classmethod
    @contextlib.asynccontextmanager
    async def of(
        cls, settings: ClientSettings, model: str, faults: Faults
    ) -> AsyncIterator["Callers"]:
        """Open the clients of an endpoint."""
        async with (
            AsyncClient(settings) as polled,
            AsyncClient(replace(settings, transport="openai")) as openai,
        ):
            with Client(settings) as blocking:
                yield cls(polled, openai, blocking, model, faults)

    def limits(self, job: Job) -> dict[str, Any]:
        """Return what every polled call is given beside its question."""

        def learn_id(progress: Progress) -> None:
            job.id = progress.job_id

        return {"execution_timeout_s": EXECUTION_TIMEOUT_S, "on_progress": learn_id}

    def options(self, job: Job, question: Question) -> dict[str, Any]:
        """Return what every polled chat is given."""
        return {**question.options, **self.limits(job)}


Caller = Callable[[Callers, Job, Question, random.Random], Awaitable[str]]


async def chat(callers: Callers, job: Job, question: Question, dice: random.Random) -> str:
    """A whole answer, sometimes to a request that is valid for a few minutes only."""
    options = {**callers.options(job, question), "ttl_s": dice.choice((None, 300))}
    return _text(await callers.polled.chat(question.prompt, **options))


async def stream(callers: Callers, job: Job, question: Question, dice: random.Random) -> str:
    """An answer piece by piece."""
    options = callers.options(job, question)
    async with callers.polled.chat(question.prompt, stream=True, **options) as answer:
        job.id = answer.job_id
        pieces = [delta.text async for delta in answer]
        if "".join(pieces) != (await answer.answer()).text:
            raise AssertionError("the pieces are not the answer")
        return "".join(pieces)


async def unfinished(callers: Callers, job: Job, question: Question, dice: random.Random) -> str:
    """A stream of a job whose result the platform loses, so that it ends at its limit."""
    options = callers.options(job, question)
    async with callers.polled.chat(question.prompt, stream=True, **options) as answer:
        job.id = answer.job_id
        job.result_lost = True
        callers.faults.add("job-done", job_id=job.id, reset=True)
        return "".join([delta.text async for delta in answer])


async def leave(callers: Callers, job: Job, question: Question, dice: random.Random) -> str:
    """A stream that is left after a few pieces, though the answer would be a long one."""
    after = dice.randrange(6)
    seen = 0
    job.one_connection = dice.random() < 0.3
    client = callers.openai if job.one_connection else callers.polled
    options = callers.options(job, question) if client is callers.polled else question.options
    if "max_tokens" in options:
        options = {**options, "max_tokens": LONG}
    async with client.chat(question.prompt, stream=True, **options) as answer:
        job.id = answer.job_id
        async for _ in answer:
            seen += 1
            if seen > after:
                break
    job.cancelled = True
    raise Left


async def interrupt(callers: Callers, job: Job, question: Question, dice: random.Random) -> str:
    """A call whose task is cancelled at some moment, if it has not ended by then."""
    way = dice.choice((chat, stream, openai_chat))
    asking = asyncio.ensure_future(way(callers, job, question, dice))
    done, _ = await asyncio.wait({asking}, timeout=dice.uniform(0, 2))
    if not done:
        job.cancelled = True
        asking.cancel()
        await asyncio.wait({asking})
        if asking.cancelled():
            raise Left
    return asking.result()


async def route(callers: Callers, job: Job, question: Question, dice: random.Random) -> str:
    """A whole answer of OpenAI's chat route."""
    body = question.body(callers.model)
    response = await callers.polled.request(
        "/v1/chat/completions", body, stream=False, **callers.limits(job)
    )
    return str(response.json()["choices"][0]["message"]["content"])


async def route_stream(callers: Callers, job: Job, question: Question, dice: random.Random) -> str:
    """The events of OpenAI's chat route."""
    job.one_connection = dice.random() < 0.3
    client = callers.openai if job.one_connection else callers.polled
    limits = callers.limits(job) if client is callers.polled else {}
    body = question.body(callers.model)
    pieces: list[str] = []
    ended = False
    async with client.request("/v1/chat/completions", body, stream=True, **limits) as events:
        job.id = events.job_id
        async for event in events:
            data = event.removeprefix(b"data: ")
            if ended := data == b"[DONE]":
                continue
            for choice in json.loads(data)["choices"]:
                pieces.append(choice["delta"].get("content") or "")
    return "".join(pieces) if ended else "(no [DONE])"


async def openai_chat(callers: Callers, job: Job, question: Question, dice: random.Random) -> str:
    """A whole answer by the platform's OpenAI route."""
    job.one_connection = True
    return _text(await callers.openai.chat(question.prompt, **question.options))


async def openai_stream(callers: Callers, job: Job, question: Question, dice: random.Random) -> str:
    """An answer by the platform's OpenAI route, piece by piece."""
    job.one_connection = True
    async with callers.openai.chat(question.prompt, stream=True, **question.options) as answer:
        return "".join([delta.text async for delta in answer])


async def submit(callers: Callers, job: Job, question: Question, dice: random.Random) -> str:
    """A job that is submitted and let go, and whose answer is asked for later."""
    submitted = await callers.polled.submit(
        question.prompt,
        record=False,
        execution_timeout_s=EXECUTION_TIMEOUT_S,
        **question.options,
    )
    job.id = submitted.id
    answer = await callers.polled.result(submitted)
    if not isinstance(answer, Answer):
        raise AssertionError("a chat was answered with a response")
    return _text(answer)


async def blocking(callers: Callers, job: Job, question: Question, dice: random.Random) -> str:
    """An answer by the client that blocks, in a thread."""
    options = {**question.options, "execution_timeout_s": EXECUTION_TIMEOUT_S}

    def ask() -> Answer:
        with callers.blocking.chat(question.prompt, stream=True, **options) as answer:
            job.id = answer.job_id
            return answer.answer()

    return _text(await asyncio.to_thread(ask))


def _text(answer: Answer) -> str:
    return answer.text


GENERATE: dict[str, tuple[Caller, float]] = {
    "chat": (chat, 3),
    "chat streamed": (stream, 5),
    "left early": (leave, 2),
    "interrupted": (interrupt, 2),
    "OpenAI route": (openai_chat, 1),
    "OpenAI route streamed": (openai_stream, 2),
    "submitted": (submit, 1),
    "blocking": (blocking, 1),
}
"""The ways to ask that every worker answers, and how often each is taken."""

EVERYTHING = {
    **GENERATE,
    "result lost": (unfinished, 0.2),
    "chat/completions": (route, 1),
    "chat/completions streamed": (route_stream, 2),
}
