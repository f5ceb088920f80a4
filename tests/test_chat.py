"""The chat route's answers, read back as `generate`'s events."""

import json
from typing import Any

import pytest

from chat import ChatReader, chat_call
from errors import RequestError
from frames import AnswerEvent, Body, Event, Head, Sse, Text
from protocol import GenerateBody


def sse(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> Sse:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, **more}
    return Sse(b"data: " + json.dumps({"choices": [choice]}).encode())


def read(*events: AnswerEvent) -> list[AnswerEvent]:
    reader = ChatReader()
    return [*reader.read(events), *reader.finish()]


STREAM = Head(200, "sse", "text/event-stream")


def test_deltas_become_texts_and_events() -> None:
    logprob = {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}
    assert read(
        STREAM,
        sse({"role": "assistant", "content": ""}),
        sse({"reasoning": "hm"}),
        sse({"content": "a"}, logprobs={"content": [logprob]}),
        sse({"tool_calls": [{"index": 2, "function": {"arguments": "{"}}]}),
        sse({}, "stop", stop_reason=7),
        Sse(b"data: [DONE]"),
    ) == [
        Head(200, "generate", ""),
        Event({"index": 0, "reasoning": "hm"}),
        Text(0, "a"),
        Event({"index": 0, "logprobs": [{"token": "a", "logprob": -1.0, "top": []}]}),
        Event({"index": 0, "tool_calls": [{"index": 2, "function": {"arguments": "{"}}]}),
        Event({"index": 0, "finish_reason": "stop", "stop_reason": 7}),
    ]


def test_an_error_is_raised_wherever_it_comes() -> None:
    error = b'{"error": {"message": "no", "type": "T", "param": "p", "code": 422}}'
    refused: list[AnswerEvent] = [
        Head(422, "body", "application/json"),
        Body(error[:9]),
        Body(error[9:]),
    ]
    for events in (
        refused,
        [STREAM, sse({"content": "a"}), Sse(b"data: " + error)],
    ):
        with pytest.raises(RequestError, match="no") as raised:
            read(*events)
        assert (raised.value.status, raised.value.param) == (422, "p")


@pytest.mark.parametrize(
    "events",
    [[sse({"content": "a"}), Sse(b"data: [DONE]")], [sse({}, "error")], []],
)
def test_an_answer_without_its_end_is_an_error(events: list[AnswerEvent]) -> None:
    with pytest.raises(RequestError, match="could not finish"):
        read(STREAM, *events)


def test_the_calls_members_are_those_of_the_chat_route() -> None:
    body = GenerateBody(
        messages=[{"role": "user", "content": "x"}],
        sampling_params={"logprobs": 2, "temperature": 0},
        tools=[{"type": "function"}],
    )
    assert json.loads(chat_call(body, "m").body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function"}],
        "temperature": 0,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 2,
    }
    with pytest.raises(RequestError, match="messages"):
        chat_call(GenerateBody(prompt="x"), "m")


def test_without_parameters_there_is_nothing_to_take_out() -> None:
    body = GenerateBody(messages=[{"role": "user", "content": "x"}], tools=[])
    assert json.loads(chat_call(body, "m").body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "tools": [],
        "stream": True,
    }
