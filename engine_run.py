"""One call on its way through the engine: how it is answered, limited and stopped.

Owns `Run`. The engine itself is engine.py's; this is given it. Knows nothing of encryption, of jobs
or of the platform.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

import msgspec

from asgi import AsgiCall
from chat import ChatReader, chat_call, unfinished
from engine_forms import FORM_ROUTES, form
from engine_sampling import choice_details, prompt_logprobs, sampling_params
from engine_tasks import Abilities, refusal
from engine_tracking import (
    TrackedCall,
    TrackedLLM,
    cancelled,
    current_call,
    queued_too_long,
)
from errors import EngineDead, RequestError
from frames import AnswerEvent, Body, End, Event, Head, Sse, Text
from protocol import GENERATE, ROUTES, Call, GenerateBody, parse_generate

MODELS = "/v1/models"


class Engine(Protocol):
    """What is needed of `engine.Engine`."""

    llm: TrackedLLM
    app: Any
    routes: tuple[str, ...]
    abilities: Abilities
    served_model_names: list[str]
    default_sampling_params: dict[str, Any]
    has_reasoning_parser: bool
    max_queue_s: float

    @property
    def dead(self) -> bool: ...

    @property
    def tokenizer(self) -> Any: ...

    async def models(self) -> dict[str, Any]: ...

    async def render(self, body: GenerateBody) -> Any: ...

    def adapter(self, model: str | None) -> Any: ...

    def request_error(self, error: Exception) -> RequestError: ...


Batch = tuple[list[AnswerEvent], bool]
"""Events, and whether they are the last."""


class Run:
    """One call on its way through the engine: iterate `batches()`, then `aclose()`.

    `aclose()` may be called from any task, also while `batches()` is being
    iterated, which then ends with RequestError, and leaves nothing of the call
    running in the engine.
    """

    def __init__(self, engine: Engine, call: Call, tracked: TrackedCall) -> None:
        self._engine = engine
        self._call = call
        self._tracked = tracked
        self._asgi: AsgiCall | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._overdue: RequestError | None = None
        self._aborting: asyncio.Future[None] | None = None
        self.usage = tracked.usage

    async def batches(self) -> AsyncIterator[list[AnswerEvent]]:
        """Yield what the engine has produced since the last time; the last batch ends with End.

        Raises RequestError, EngineDead among them; whatever vLLM raises is mapped here.
        """
        current_call.set(self._tracked)
        produce = self._generate if self._call.route == GENERATE else self._serve
        self._limit_queueing()
        try:
            async with contextlib.aclosing(produce()) as batches:
                async for batch, last in batches:
                    # vLLM ends both kinds of stream as if nothing had happened.
                    if self._engine.dead:
                        raise EngineDead
                    if self._overdue:
                        raise self._overdue
                    if self._tracked.closed:
                        raise cancelled()
                    if last:
                        batch.append(End(self.usage.tokens(), self.usage.timings()))
                    yield batch
        except Exception as error:
            if self._tracked.closed and not self._engine.dead:
                raise cancelled() from None
            raise self._engine.request_error(self._overdue or error) from None
        finally:
            if self._timer:
                self._timer.cancel()

    def _limit_queueing(self) -> None:
        """Refuse the call if it has no first token after MAX_QUEUE_S."""
        if self._engine.max_queue_s:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._engine.max_queue_s, self._refuse_if_it_waits)

    def _refuse_if_it_waits(self) -> None:
        engine, tracked = self._engine, self._tracked
        if engine.llm.waits(tracked):
            self._overdue = queued_too_long(engine.max_queue_s)
            self._aborting = asyncio.ensure_future(engine.llm.abort(list(tracked.request_ids)))

    async def aclose(self) -> None:
        """Stop whatever of the call still runs; harmless when nothing does."""
        self._tracked.closed = True  # what has not reached the engine yet never will
        if self._tracked.request_ids and not self._engine.dead:
            await self._engine.llm.abort(list(self._tracked.request_ids))
        if self._asgi is not None:
            await self._asgi.aclose()

    async def _serve(self) -> AsyncGenerator[Batch, None]:
        """Answer by vLLM's own route."""
        call = self._call
        if call.route not in self._engine.routes:
            raise self._engine.abilities.no_such_route(call.route)
        method = ROUTES[call.route]
        if method != call.method:
            raise RequestError(f"{call.route} takes {method}", status=405)
        try:
            self._engine.abilities.check(call)
        except RequestError as error:
            yield _whole(error.status, refusal(error, call.route)), True
            return
        if call.route == MODELS:
            yield _whole(200, await self._engine.models()), True
            return
        body, content_type = call.body, "application/json"
        if call.route in FORM_ROUTES:
            body, content_type = form(body)
        self._asgi = AsgiCall(self._engine.app, method, call.route, body, content_type)
        start = await self._asgi.start()
        content_type = start.headers.get("content-type", "")
        sse = content_type.startswith("text/event-stream")
        batch: list[AnswerEvent] = [Head(start.status, "sse" if sse else "body", content_type)]
        rest = b""
        async with contextlib.aclosing(self._asgi.parts()) as parts:
            async for pieces, last in parts:
                if sse:
                    *events, rest = (rest + b"".join(pieces)).split(b"\n\n")
                    batch += [Sse(event) for event in events]
                    if last and rest:
                        batch.append(Sse(rest))
                else:
                    batch += [Body(piece) for piece in pieces]
                yield batch, last
                batch = []

    async def _generate(self) -> AsyncGenerator[Batch, None]:
        """Answer the `generate` route: text deltas straight from the engine."""
        engine = self._engine
        engine.abilities.check(self._call)
        body = parse_generate(self._call.body)
        lora = engine.adapter(body.model)
        params = sampling_params(body, engine.default_sampling_params)
        if body.tools or (body.messages and engine.has_reasoning_parser):
            self._call = chat_call(body, engine.served_model_names[0])
            reader = ChatReader()
            async with contextlib.aclosing(self._serve()) as batches:
                async for batch, last in batches:
                    yield [*reader.read(batch), *(reader.finish() if last else ())], last
            return
        events: list[AnswerEvent] = [Head(200, "generate", "")]
        outputs = engine.llm.generate(
            await engine.render(body), params, f"generate-{self._tracked.number}", lora_request=lora
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if output.prompt_logprobs and params.prompt_logprobs is not None:
                    events.append(Event({"prompt_logprobs": prompt_logprobs(output)}))
                for choice in output.outputs:
                    if choice.finish_reason == "error":
                        raise unfinished()
                    if choice.text:
                        events.append(Text(choice.index, choice.text))
                    events += choice_details(choice, engine.tokenizer)
                yield events, output.finished
                events = []


def _whole(status: int, content: Any) -> list[AnswerEvent]:
    """Return an answer of our own in the place of vLLM's."""
    return [Head(status, "body", "application/json"), Body(msgspec.json.encode(content))]
