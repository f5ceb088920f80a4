"""Frames: what goes in comes out, whatever the events and wherever payloads are cut."""

import json
import math
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frames import (
    FILL,
    MAX_TEMPLATES,
    SSE,
    TEMPLATE,
    AnswerEvent,
    Body,
    End,
    Event,
    FrameDecoder,
    FrameEncoder,
    Head,
    Sse,
    Text,
    merge,
)

END = End({"total_tokens": 3}, {"total_ms": 1.5})


def frame(kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">BI", kind, len(data)) + data


def kinds(data: bytes) -> list[int]:
    found, at = [], 0
    while at < len(data):
        kind, length = struct.unpack_from(">BI", data, at)
        found.append(kind)
        at += 5 + length
    return found


def decode(payloads: Sequence[bytes]) -> list[AnswerEvent]:
    decoder = FrameDecoder()
    events = [event for payload in payloads for event in decoder.feed(payload)]
    assert not decoder.pending
    return events


def chat_event(content: str, finish: str | None = None) -> Sse:
    """Return an event as vLLM's chat route sends it."""
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    data = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}
    return Sse(b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode())


texts = st.text(st.characters(codec="utf-8"))
lines = st.one_of(
    texts.map(chat_event),
    texts.map(lambda text: chat_event(text, "stop")),
    st.builds(
        lambda number, text: Sse(
            b'event: response.delta\ndata: {"delta":%s,"sequence_number":%d}'
            % (json.dumps(text).encode(), number)
        ),
        st.integers(0, 999),
        texts,
    ),
    texts.map(lambda text: Sse(text.encode())),
    st.lists(
        st.sampled_from([b'"content":"', b'"', b"\\", b"\\\\", b'"text":"a"', b"\0", b",", b"1"])
    ).map(lambda parts: Sse(b"".join(parts))),
)
events = st.one_of(
    lines,
    st.builds(Text, st.integers(0, 65535), texts),
    st.builds(Body, st.binary()),
    st.builds(Event, st.dictionaries(texts, texts, max_size=3)),
)


@given(st.lists(events, max_size=20), st.lists(st.integers(0, 400), max_size=5))
@example([Sse(b'"text":"a"'), Sse(b'"text":"\0"')], [])
@example([Sse(b'"text":"a"'), Sse(b'"text":"a","x":"b"'), Sse(b'"text":""')], [])
@settings(max_examples=300, deadline=None)
def test_events_come_back_however_payloads_are_cut(
    story: list[AnswerEvent], cuts: list[int]
) -> None:
    head = Head(200, "sse", "text/event-stream")
    data = FrameEncoder().encode([head, *story, END])
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    payloads = [data[a:b] for a, b in pairwise(bounds)]
    assert decode(payloads) == list(merge([head, *story, END]))


@given(st.lists(lines, max_size=30))
@settings(max_examples=100, deadline=None)
def test_templates_live_as_long_as_the_encoder(story: list[AnswerEvent]) -> None:
    encoder = FrameEncoder()
    assert decode([encoder.encode([event]) for event in story]) == story


@given(st.lists(texts, min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_constant_json_travels_once(contents: list[str]) -> None:
    encoder = FrameEncoder()
    first, *rest = [encoder.encode([chat_event(content)]) for content in contents]
    assert kinds(first) == [TEMPLATE, FILL]
    for content, data in zip(contents[1:], rest, strict=True):
        assert kinds(data) == [FILL]
        assert len(data) == 7 + len(json.dumps(content, ensure_ascii=False).encode()) - 2


def test_templates_of_two_shapes_alternate() -> None:
    encoder = FrameEncoder()
    story = [chat_event("a"), chat_event("b", "stop")] * 3
    payloads = [encoder.encode([event]) for event in story]
    assert [kinds(payload) for payload in payloads] == [[TEMPLATE, FILL]] * 2 + [[FILL]] * 4
    assert decode(payloads) == story


def test_templates_are_bounded_on_both_sides() -> None:
    story = [Sse(b'{"id":%d,"text":"x"}' % number) for number in range(MAX_TEMPLATES + 5)]
    data = FrameEncoder().encode(story)
    assert kinds(data).count(TEMPLATE) == MAX_TEMPLATES
    assert kinds(data).count(SSE) == 5
    assert decode([data]) == story
    with pytest.raises(ValueError, match="too many"):
        FrameDecoder().feed(frame(TEMPLATE, b"a\0b") * (MAX_TEMPLATES + 1))


def test_neighbouring_pieces_become_one_frame() -> None:
    story: list[AnswerEvent] = [
        Text(0, "a"), Text(0, "b"), Text(1, "c"), Text(0, "d"), Body(b"e"), Body(b"f"), END,
    ]  # fmt: skip
    assert list(merge(story)) == [Text(0, "ab"), Text(1, "c"), Text(0, "d"), Body(b"ef"), END]


def test_numbers_that_json_does_not_have_become_null() -> None:
    data = FrameEncoder().encode([Event({"logprobs": [-math.inf, math.nan, 1.5]})])
    assert decode([data]) == [Event({"logprobs": [None, None, 1.5]})]


def test_a_lone_surrogate_does_not_end_the_answer() -> None:
    assert decode([FrameEncoder().encode([Text(0, "a\ud800b")])]) == [Text(0, "a?b")]


def test_what_is_not_utf8_does_not_end_an_event_stream() -> None:
    broken = [Sse(b'{"text":"\xff"}'), Sse(b'{"text":"\xc3"}')]
    mended = [Sse('{"text":"\ufffd"}'.encode())] * 2
    assert decode([FrameEncoder().encode(broken)]) == mended


def test_pending_and_ended() -> None:
    data = FrameEncoder().encode([END])
    decoder = FrameDecoder()
    assert decoder.feed(data[:-1]) == []
    assert decoder.pending and not decoder.ended
    assert decoder.feed(data[-1:]) == [END]
    assert decoder.ended and not decoder.pending


@pytest.mark.parametrize(
    "data",
    [
        frame(0),
        frame(9),
        frame(255, b"x"),
        frame(1, b"{}"),
        frame(1, b"nonsense"),
        frame(1, b'{"status":"x","kind":"body","content_type":""}'),
        frame(1, b'{"status":200,"kind":"other","content_type":""}'),
        frame(2),
        frame(2, b"\0"),
        frame(2, b"\0\0\xff"),
        frame(3, b"[]"),
        frame(3, b'{"a":NaN}'),
        frame(3, b"[" * 10_000),
        frame(6, b"\0\0x"),
        frame(6, b"\0"),
        frame(5, b"a\0b") + frame(6, b"\0\0x\0y"),
        frame(5, b"a\0b") + frame(6, b"\0\1x"),
        frame(3, b"x"),
        frame(5, b""),
        frame(5, b"only one piece"),
        frame(5, b"\xff\0"),
        frame(5, b"a\0b") + frame(6, b"\0\0\xff"),
        frame(7, b"\xff"),
        frame(8, b"{}"),
        frame(8, b'{"usage":null,"timings":{}}'),
        frame(8, b'{"usage":null,"error":null}'),
        frame(8, b'{"usage":null,"timings":null,"error":null}'),
        frame(8, b'{"usage":1,"timings":{},"error":null}'),
        frame(8, b'{"usage":null,"timings":{},"error":null}') + frame(7, b"x"),
        frame(7, b"x") + frame(1, b'{"status":200,"kind":"body","content_type":""}'),
    ],
    ids=lambda data: ascii(data)[:40],
)
def test_malformed_frames_are_value_errors(data: bytes) -> None:
    with pytest.raises(ValueError):
        FrameDecoder().feed(data)


@given(st.lists(st.binary(max_size=40), max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_frames_or_a_value_error(payloads: list[bytes]) -> None:
    decoder = FrameDecoder()
    try:
        for payload in payloads:
            decoder.feed(payload)
    except ValueError:
        pass


def test_unknown_members_are_ignored() -> None:
    data = frame(1, b'{"status":200,"kind":"body","content_type":"x","later":1}')
    data += frame(8, b'{"usage":null,"timings":{},"error":null,"later":[]}')
    assert decode([data]) == [Head(200, "body", "x"), End(None, {})]


def test_a_long_event_is_split_in_linear_time() -> None:
    hard: Any = b'data: {"content":"' + b"\\\\" * 200_000 + b'"}'
    assert decode([FrameEncoder().encode([Sse(hard), Sse(hard[:-1]), Sse(hard)])]) == [
        Sse(hard), Sse(hard[:-1]), Sse(hard),
    ]  # fmt: skip
