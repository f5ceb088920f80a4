"""The `generate` route by way of the chat route, for what only vLLM's chat serving parses:
tool calls and reasoning (SPEC section 8.1).

Owns the translation there and back. Knows nothing of the engine.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from errors import RequestError
from frames import AnswerEvent, Body, Event, Head, Sse, Text
from protocol import Call, GenerateBody

CHAT_ROUTE = "/v1/chat/completions"


def chat_call(body: GenerateBody, model: str) -> Call:
    """Return the chat route's call for a `generate` body that has messages."""
    if body.messages is None:
        raise RequestError("generate: `tools` needs `messages`", param="tools")
    request = {"model": model, **msgspec.to_builtins(body), **body.sampling_params}
    request.pop("sampling_params", None)  # not there where nobody gave any
    request["stream"] = body.stream
    top = request.pop("logprobs", None)
    if top is not None:
        request |= {"logprobs": True, "top_logprobs": top}
    return Call(CHAT_ROUTE, "POST", msgspec.json.encode(request))


def unfinished() -> RequestError:
    """Return the error of an answer that the engine gave up, which vLLM may show as a short one."""
    return RequestError(
        "the engine could not finish this answer", status=500, type="InternalServerError"
    )


class ChatReader:
    """Turns the chat route's events into those of `generate`."""

    def __init__(self) -> None:
        self._failed: int | None = None
        self._body = b""
        self._finished = False

    def read(self, events: Iterable[AnswerEvent]) -> Iterator[AnswerEvent]:
        """Yield what `events` mean; RequestError if the chat route refused."""
        for event in events:
            match event:
                case Head(status, _, _):
                    self._failed = status if status >= 400 else None
                    if self._failed is None:
                        yield Head(200, "generate", "")
                case Sse(data) if data.startswith(b"data: {"):
                    chunk = msgspec.json.decode(data[len(b"data: ") :])
                    if "error" in chunk:
                        raise RequestError.from_body(chunk, int(chunk["error"].get("code") or 500))
                    yield from self._choices(chunk, "delta")
                case Body(data):
                    self._body += data

    def finish(self) -> Iterator[AnswerEvent]:
        """Yield what an answer in one piece holds; RequestError if it is refused or has no end."""
        if self._body:
            answer = msgspec.json.decode(self._body)
            if self._failed is not None:
                raise RequestError.from_body(answer, self._failed)
            yield from self._choices(answer, "message")
        if not self._finished:
            raise unfinished()

    def _choices(self, answer: dict[str, Any], part: str) -> Iterator[AnswerEvent]:
        for choice in answer.get("choices", ()):
            self._finished |= choice.get("finish_reason") is not None
        yield from _choices(answer, part)


def _choices(answer: dict[str, Any], part: str) -> Iterator[AnswerEvent]:
    if answer.get("prompt_logprobs"):
        yield Event({"prompt_logprobs": answer["prompt_logprobs"]})
    for choice in answer.get("choices", ()):
        index, message = choice["index"], choice[part]
        if message.get("content"):
            yield Text(index, message["content"])
        detail: dict[str, Any] = {}
        reasoning = message.get("reasoning") or message.get("reasoning_content")
        if reasoning:
            detail["reasoning"] = reasoning
        if message.get("tool_calls"):
            # Whole calls have no index; deltas do, and clients join by it.
            detail["tool_calls"] = [
                {"index": number, **call} for number, call in enumerate(message["tool_calls"])
            ]
        if (choice.get("logprobs") or {}).get("content"):
            detail["logprobs"] = [_logprob(entry) for entry in choice["logprobs"]["content"]]
        if choice.get("finish_reason") == "error":
            raise unfinished()
        if choice.get("finish_reason"):
            detail["finish_reason"] = choice["finish_reason"]
            detail["stop_reason"] = choice.get("stop_reason")
        if detail:
            yield Event({"index": index, **detail})


def _logprob(entry: dict[str, Any]) -> dict[str, Any]:
    def plain(value: dict[str, Any]) -> dict[str, Any]:
        return {"token": value["token"], "logprob": value["logprob"]}

    return {**plain(entry), "top": [plain(other) for other in entry.get("top_logprobs", ())]}
