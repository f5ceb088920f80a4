"""What a caller gets: deltas, whole answers, responses and progress, built from an answer's events.

Owns these types and the folding of events into them (SPEC sections 6 and 8.1).
Knows nothing of chunks, keys, HTTP or jobs beyond their ids.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from delivery import end_error
from errors import AnswerError, RequestError
from frames import AnswerEvent, Body, End, Event, Head, Kind, Sse, Text


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job stands; `workers` are the platform's counts, None when it was not asked."""

    state: str
    """`queued` or `running`."""
    waited_s: float
    job_id: str
    workers: dict[str, int] | None = None
    note: str = ""
    """What the worker says of the wait, such as `loading model org/name`."""


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of a choice."""

    index: int
    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """OpenAI's tool call deltas."""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Choice:
    """One finished choice."""

    index: int
    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Whole tool calls: `{"id", "type", "function": {"name", "arguments"}}`."""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole, authenticated answer of the `generate` route."""

    choices: tuple[Choice, ...]
    usage: dict[str, Any] | None
    timings: dict[str, Any]
    job_id: str
    request_id: str
    prompt_logprobs: list[dict[str, Any] | None] | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text if self.choices else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as one JSON object."""
        return {"text": self.text, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Response:
    """A whole, authenticated answer of an OpenAI or vLLM route."""

    status: int
    content_type: str
    body: bytes
    usage: dict[str, Any] | None
    timings: dict[str, Any]
    job_id: str
    request_id: str

    def json(self) -> Any:
        """Return the decoded body; AnswerError where it is not JSON."""
        try:
            return msgspec.json.decode(self.body)
        except ValueError as error:
            raise AnswerError(f"the answer's body is not JSON: {error}") from None

    def error(self) -> RequestError | None:
        """Return the error that the body describes, if the status is one."""
        return body_error(self.status, self.body) if self.status >= 400 else None


def body_error(status: int, body: bytes) -> RequestError:
    """Return the error of an HTTP error answer, whatever its body is."""
    try:
        value = msgspec.json.decode(body)
    except ValueError:
        value = None
    return RequestError.from_body(value, status)


class AnswerBuilder:
    """Folds the events of a `generate` answer into deltas and, at the end, an Answer."""

    def __init__(self) -> None:
        self._choices: dict[int, Choice] = {}
        self._texts: dict[int, list[str]] = {}
        self._prompt_logprobs: list[dict[str, Any] | None] | None = None
        self._status = 200
        self._error_body = b""
        self._end: End | None = None

    def feed(self, events: Iterable[AnswerEvent]) -> Iterator[Delta]:
        """Yield the deltas of `events`; RequestError when the answer ends with an error."""
        for event in events:
            match event:
                case Text(index, delta):
                    self._choice(index)
                    self._texts[index].append(delta)
                    yield Delta(index, delta)
                case Event(data):
                    yield from self._event(data)
                case Head(status):
                    self._status = status
                case Body(data) if self._status >= 400:
                    self._error_body += data
                case End():
                    self._end = event
                    if error := end_error(event):
                        raise error
                    if self._status >= 400:
                        raise body_error(self._status, self._error_body)
                case _:
                    raise AnswerError("the worker answered with another kind than was asked for")

    def answer(self, job_id: str, request_id: str) -> Answer:
        """Return the whole answer; only after its end."""
        if self._end is None:
            raise RuntimeError("the answer has not ended")
        for index, texts in self._texts.items():
            self._choices[index].text = "".join(texts)
        return Answer(
            choices=tuple(self._choices[index] for index in sorted(self._choices)),
            usage=self._end.usage,
            timings=self._end.timings,
            job_id=job_id,
            request_id=request_id,
            prompt_logprobs=self._prompt_logprobs,
        )

    def _choice(self, index: int) -> Choice:
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = Choice(index)
            self._texts[index] = []
        return choice

    def _event(self, data: dict[str, Any]) -> Iterator[Delta]:
        if "prompt_logprobs" in data:
            self._prompt_logprobs = data["prompt_logprobs"]
            return
        try:
            delta = msgspec.convert(data, _EventData)
        except msgspec.ValidationError as error:
            raise AnswerError(f"the worker sent an event of unknown form: {error}") from None
        choice = self._choice(delta.index)
        choice.reasoning += delta.reasoning or ""
        _merge_tool_calls(choice.tool_calls, delta.tool_calls or [])
        choice.logprobs += delta.logprobs or []
        choice.finish_reason = delta.finish_reason or choice.finish_reason
        if delta.stop_reason is not None:
            choice.stop_reason = delta.stop_reason
        yield Delta(
            delta.index,
            "",
            delta.reasoning or "",
            delta.tool_calls or [],
            delta.logprobs or [],
            delta.finish_reason,
            delta.stop_reason,
        )


class _EventData(msgspec.Struct, frozen=True):
    index: int
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


def _merge_tool_calls(calls: list[dict[str, Any]], deltas: Iterable[dict[str, Any]]) -> None:
    """Fold OpenAI's tool call deltas, told apart by `index`, into whole calls."""
    for delta in deltas:
        number = delta.get("index", len(calls))
        if not isinstance(number, int) or not 0 <= number <= len(calls):
            raise AnswerError("the worker sent a tool call out of order")
        if number == len(calls):
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call = calls[number]
        call["id"] = delta.get("id") or call["id"]
        call["type"] = delta.get("type") or call["type"]
        function = delta.get("function") or {}
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


class ResponseBuilder:
    """Folds the events of a `body` or `sse` answer into its pieces and, at the end, a Response."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.end: End | None = None
        self._body = bytearray()

    def feed(self, events: Iterable[AnswerEvent]) -> Iterator[bytes]:
        """Yield the pieces of `events`: one server-sent event each, or parts of the body."""
        for event in events:
            match event:
                case Head():
                    self.head = event
                case Body(data):
                    self._body += data
                    yield data
                case Sse(data):
                    # What goes over the wire for an event is its lines and a blank one.
                    self._body += data + b"\n\n"
                    yield data
                case End():
                    self.end = event
                    if error := end_error(event):
                        raise error
                    if self.head is None:
                        raise AnswerError("the answer ended without a status")
                case _:
                    raise AnswerError("the worker answered with another kind than was asked for")

    def response(self, job_id: str, request_id: str) -> Response:
        """Return the whole response; only after its end."""
        if self.end is None or self.head is None:
            raise RuntimeError("the answer has not ended")
        return Response(
            status=self.head.status,
            content_type=self.head.content_type,
            body=bytes(self._body),
            usage=self.end.usage,
            timings=self.end.timings,
            job_id=job_id,
            request_id=request_id,
        )

    @property
    def kind(self) -> Kind | None:
        """The kind of the answer, None until it is known."""
        return self.head.kind if self.head else None
