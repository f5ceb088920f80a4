"""What each call has running in the engine: its ids, its isolation, its usage.

Owns `TrackedLLM`, vLLM's `AsyncLLM` that attributes every request to the call
whose task made it, whichever of vLLM's routes that went through.
"""

import contextlib
import contextvars
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from errors import RequestError


@dataclass(slots=True)
class Usage:
    """What one request cost; times in seconds on the monotonic clock."""

    started: float = field(default_factory=time.perf_counter)
    accepted: float | None = None
    first_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def tokens(self) -> dict[str, Any] | None:
        """Return OpenAI's `usage` object, or None where the engine was not asked."""
        if self.accepted is None:
            return None
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def timings(self) -> dict[str, float | None]:
        """Return milliseconds since the start: `queue_ms`, `first_token_ms`, `total_ms`."""

        def since(moment: float | None) -> float | None:
            return None if moment is None else round(1000 * (moment - self.started), 1)

        return {
            "queue_ms": since(self.accepted),
            "first_token_ms": since(self.first_token),
            "total_ms": since(time.perf_counter()),
        }


@dataclass(slots=True, eq=False)
class TrackedCall:
    """What the engine knows of the call that a task is working for."""

    number: int
    cache_salt: str
    usage: Usage = field(default_factory=Usage)
    request_ids: set[str] = field(default_factory=set)
    closed: bool = False


def cancelled() -> RequestError:
    """Return what ends a call that was closed; nobody should be waiting for it."""
    return RequestError("the request was cancelled", status=499, type="Cancelled")


def queued_too_long(max_queue_s: float) -> RequestError:
    """Return what ends a call that had no first token in time."""
    return RequestError(
        f"the request was {max_queue_s:g} s in the queue of this worker without its first token, "
        "and MAX_QUEUE_S allows no more: send it again later, or let more workers run",
        status=503,
        type="ServiceUnavailableError",
        code="queue_too_long",
    )


current_call: contextvars.ContextVar[TrackedCall | None] = contextvars.ContextVar(
    "call", default=None
)


class TrackedLLM(AsyncLLM):
    """`AsyncLLM` that knows which call each of its requests belongs to.

    Every request, whichever of vLLM's routes made it, gets an id of its own
    (an id chosen by a client could stop somebody else's request), its
    client's cache salt and no priority.
    """

    generated_tokens = 0
    stream_interval = 1
    _given_up = False

    @property
    def errored(self) -> bool:
        """Whether the engine is dead, as vLLM sees it or because it was given up."""
        return self._given_up or super().errored

    def give_up(self) -> None:
        """Take the engine for dead from now on, and tell all who wait for it."""
        self._given_up = True
        self.output_processor.propagate_error(EngineDeadError())

    def waits(self, call: TrackedCall) -> bool:
        """Return whether a call has requests in the engine and none has come to a token yet."""
        processor = self.output_processor
        inside = [
            processor.request_states.get(inner)
            for outer in call.request_ids
            for inner in processor.external_req_ids.get(outer, ("",))
        ]
        return bool(inside) and all(state is not None and state.is_prefilling for state in inside)

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        call = current_call.get()
        if call is None:
            return await super().add_request(request_id, prompt, params, *args, **kwargs)
        if call.closed:
            raise cancelled()
        request_id = f"{call.number}-{request_id}"
        call.request_ids.add(request_id)
        if isinstance(prompt, dict):
            prompt["cache_salt"] = call.cache_salt
        if "priority" in kwargs:
            kwargs["priority"] = 0
        if isinstance(params, SamplingParams) and self.stream_interval > 1:
            params.stream_interval = max(self.stream_interval, params.stream_interval or 1)
        collector = await super().add_request(request_id, prompt, params, *args, **kwargs)
        if call.closed:  # while it was on its way: then its end found nothing to abort
            await self.abort(request_id)
        if call.usage.accepted is None:
            call.usage.accepted = time.perf_counter()
        return collector

    async def generate(
        self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        call = current_call.get()
        usage = Usage() if call is None else call.usage
        cumulative = sampling_params.output_kind == RequestOutputKind.CUMULATIVE
        counted: dict[int, int] = {}
        begun = False
        outputs = super().generate(prompt, sampling_params, *args, **kwargs)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if usage.first_token is None:
                    usage.first_token = time.perf_counter()
                if not begun:  # not at its end, which a request that is stopped never sees
                    begun = True
                    usage.prompt_tokens += len(output.prompt_token_ids or ())
                generated = 0
                for choice in output.outputs:
                    generated += len(choice.token_ids)
                    if cumulative:
                        generated -= counted.get(choice.index, 0)
                        counted[choice.index] = len(choice.token_ids)
                usage.completion_tokens += generated
                self.generated_tokens += generated
                if output.finished:
                    usage.cached_tokens += output.num_cached_tokens or 0
                yield output

    async def encode(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        call = current_call.get()
        outputs = super().encode(*args, **kwargs)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if call is not None and output.finished:
                    call.usage.prompt_tokens += len(output.prompt_token_ids or ())
                yield output

    def spread_outputs(self, interval: int) -> None:
        """Let every running stream put out `interval` tokens at a time from now on.

        vLLM fixes the interval when a request begins, but load changes while it
        runs. It counts what was sent only while the interval is above 1, hence
        the offset, and hence never back to 1.
        """
        self.stream_interval = interval
        for state in self.output_processor.request_states.values():
            if state.detokenizer is None or state.output_kind != RequestOutputKind.DELTA:
                continue
            if state.stream_interval == 1 and interval > 1:
                state.sent_tokens_offset = state.detokenizer.num_output_tokens()
                state.stream_interval = interval
            elif state.stream_interval > 1:
                state.stream_interval = max(2, interval)
