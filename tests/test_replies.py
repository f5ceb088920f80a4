"""The three forms of an answer: what is yielded for which events."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from crypto import AnswerOpener, new_request
from errors import Rejected, RequestError
from frames import AnswerEvent, Body, End, Event, FrameDecoder, Head, Note, Sse, Text
from keys import Key, KeyRing, generate_key
from protocol import Request, parse_job_input
from replies import PlaintextReply, SealedReply, SimpleReply, rejection
from simple_form import open_simple_answer

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
ERROR = {"message": "no", "type": "T", "param": None, "code": 400, "status": 400}
HEAD = Head(200, "generate", "")
FINISH = Event({"index": 0, "finish_reason": "stop", "stop_reason": None})


@pytest.fixture
def key() -> Key:
    return KeyRing.parse(generate_key()).first


@pytest.fixture
def request_() -> Request:
    return new_request("generate", b"{}", audience="local", ttl_s=60)


def plaintext(job_input: dict[str, Any]) -> PlaintextReply:
    return PlaintextReply(parse_job_input(job_input))  # type: ignore[arg-type]


class TestSealed:
    def test_one_batch_is_one_chunk_and_the_end_is_final(self, key: Key, request_: Request) -> None:
        reply = SealedReply(request_, key)
        chunks = reply.render([HEAD, Text(0, "a")]) + reply.render([Text(0, "b"), End(USAGE, {})])
        opener, decoder = AnswerOpener(request_, key), FrameDecoder()
        opened = [opener.open(chunk) for chunk in chunks]
        assert [chunk.final for chunk in opened] == [False, True]
        assert [event for chunk in opened for event in decoder.feed(chunk.payload)] == [
            HEAD,
            Text(0, "a"),
            Text(0, "b"),
            End(USAGE, {}),
        ]

    def test_nothing_to_say_is_no_chunk(self, key: Key, request_: Request) -> None:
        assert SealedReply(request_, key).render([]) == []

    def test_a_long_batch_takes_several_chunks_of_which_the_last_is_final(
        self, key: Key, request_: Request
    ) -> None:
        chunks = SealedReply(request_, key).render([Body(b"x" * 1_200_000), End(None, {})])
        opened = [AnswerOpener(request_, key).open(chunk) for chunk in chunks]
        assert [chunk.final for chunk in opened] == [False, False, True]
        assert all(len(chunk) < 1_000_000 for chunk in chunks)

    def test_as_events_each_chunk_is_one(self, key: Key, request_: Request) -> None:
        reply = SealedReply(request_, key, as_events=True)
        yielded = [
            *reply.padding(),
            *reply.render([Body(b"x" * 600_000)]),
            *reply.seal(reply.payload([End(None, {})]), True),
        ]
        for item in yielded:
            assert item.startswith("data: 1.") and item.endswith("\n\n")
            assert item.count("\n") == 2
        opener = AnswerOpener(request_, key)
        opened = [opener.open(item[6:-2]) for item in yielded]
        assert [chunk.seq for chunk in opened] == [0, 1, 2, 3]
        assert [chunk.final for chunk in opened] == [False, False, False, True]
        assert opened[0].payload == b""

    def test_a_note_is_an_attempt_of_its_own(self, key: Key, request_: Request) -> None:
        reply = SealedReply(request_, key)
        (note,), (later,) = (reply.render([Note(words)]) for words in ("loading", "still"))
        (answer,) = reply.render([HEAD, End(USAGE, {})])
        opener = AnswerOpener(request_, key)
        opened = [opener.open(chunk) for chunk in (note, later, answer)]
        assert len({chunk.salt for chunk in opened}) == 3
        assert [(chunk.seq, chunk.final) for chunk in opened] == [
            (0, False),
            (0, False),
            (0, True),
        ]
        assert FrameDecoder().feed(opened[0].payload) == [Note("loading")]
        assert len(note) == len(answer)
        (event,) = SealedReply(request_, key, as_events=True).render([Note("loading")])
        assert event.startswith("data: 1.") and event.endswith("\n\n")

    def test_paced_a_note_takes_the_place_of_padding(self, key: Key, request_: Request) -> None:
        reply = SealedReply(request_, key)
        assert reply.payload([Note("loading")]) == b""
        begun = reply.payload([HEAD])
        chunks = [
            reply.seal(*given)
            for given in ((begun, False), (b"", False), (b"", False), (b"", True))
        ]
        opener = AnswerOpener(request_, key)
        opened = [opener.open(chunk) for (chunk,) in chunks]
        assert opened[1].salt != opened[0].salt
        assert [chunk.seq for chunk in opened] == [0, 0, 1, 2]
        assert FrameDecoder().feed(opened[1].payload) == [Note("loading")]

    def test_a_rejection_is_a_failed_job_and_an_event_before_it(self) -> None:
        assert rejection(as_events=False) == [{"error": Rejected.TEXT}]
        assert rejection(as_events=True) == [
            f"data: {Rejected.TEXT}\n\n",
            {"error": Rejected.TEXT},
        ]


class TestSimple:
    def objects(self, key: Key, *batches: Iterable[AnswerEvent]) -> list[dict[str, Any]]:
        reply = SimpleReply(key)
        return [
            open_simple_answer(key, chunk) for batch in batches for chunk in reply.render(batch)
        ]

    def test_a_note_is_left_out(self, key: Key) -> None:
        assert self.objects(key, [Note("loading")]) == []

    def test_text_then_end(self, key: Key) -> None:
        assert self.objects(
            key, [HEAD, Text(0, "a")], [], [Text(0, "b"), FINISH, End(USAGE, {})]
        ) == [
            {"seq": 0, "text": "a"},
            {"seq": 1, "text": "b", "done": True, "finish_reason": "stop", "usage": USAGE},
        ]

    def test_an_error_ends_it(self, key: Key) -> None:
        assert self.objects(key, [End(None, {}, ERROR)]) == [
            {"seq": 0, "text": "", "done": True, "usage": None, "error": ERROR}
        ]

    def test_choices_and_details_are_told_apart(self, key: Key) -> None:
        logprobs = [{"token": "x", "token_id": 1, "logprob": -1.0, "top": []}]
        assert self.objects(
            key,
            [Text(0, "a"), Text(1, "b"), Event({"index": 0, "logprobs": logprobs})],
            [Text(1, "c"), Event({"index": 1, "finish_reason": "length"}), End(USAGE, {})],
        ) == [
            {"seq": 0, "text": "a"},
            {"seq": 1, "index": 1, "text": "b"},
            {"seq": 2, "index": 0, "text": "", "logprobs": logprobs},
            {"seq": 3, "index": 1, "text": "c"},
            {"seq": 4, "text": "", "done": True, "finish_reason": "length", "usage": USAGE},
        ]

    def test_long_text_is_split(self, key: Key) -> None:
        objects = self.objects(key, [Text(0, "\x00" * 600_000), End(USAGE, {})])
        assert "".join(item["text"] for item in objects) == "\x00" * 600_000
        assert [item.get("done", False) for item in objects] == [False] * (len(objects) - 1) + [
            True
        ]

    def test_the_error_of_a_detail_that_no_chunk_holds_leaves_no_gap(self, key: Key) -> None:
        reply = SimpleReply(key)
        huge = Event({"logprobs": [{"token": "x" * 100}] * 100_000})
        with pytest.raises(RequestError):
            reply.render([Text(0, "a"), huge])
        (chunk,) = reply.render([End(None, {}, ERROR)])
        assert open_simple_answer(key, chunk)["seq"] == 0

    def test_a_detail_that_no_chunk_holds_is_an_error_that_says_so(self, key: Key) -> None:
        huge = Event({"prompt_logprobs": [{"1": -1.0}] * 100_000})
        with pytest.raises(RequestError, match="larger than a chunk of the simple form"):
            SimpleReply(key).render([huge])


class TestPlaintext:
    def test_a_whole_answer_is_one_batch(self) -> None:
        reply = plaintext({"prompt": "x"})
        assert reply.render([HEAD, Text(0, "a")]) == []
        assert reply.render([Text(0, "b"), FINISH, End(USAGE, {})]) == [
            {"choices": [{"tokens": ["ab"]}], "usage": {"input": 3, "output": 2}}
        ]

    def test_a_streamed_answer_is_a_batch_each(self) -> None:
        reply = plaintext({"prompt": "x", "stream": True})
        assert reply.render([HEAD, Text(0, "a")]) == [{"choices": [{"tokens": ["a"]}]}]
        assert reply.render([]) == []
        assert reply.render([End(USAGE, {})]) == [
            {"choices": [], "usage": {"input": 3, "output": 2}}
        ]

    def test_a_body_is_the_routes_json(self) -> None:
        reply = plaintext({"openai_route": "/v1/models"})
        assert reply.render([Head(200, "body", ""), Body(b'{"a":')]) == []
        assert reply.render([Body(b" 1}"), End(None, {})]) == [{"a": 1}]

    def test_events_are_the_text_of_the_response(self) -> None:
        reply = plaintext(
            {
                "openai_route": "/v1/chat/completions",
                "openai_input": {"messages": [], "stream": True},
            }
        )
        assert reply.render([Head(200, "sse", ""), Sse(b"data: 1"), Sse(b"data: 2")]) == [
            "data: 1\n\ndata: 2\n\n"
        ]
        assert reply.render([Sse(b"data: [DONE]"), End(USAGE, {})]) == ["data: [DONE]\n\n"]

    def test_an_error_is_json_that_survives_str(self) -> None:
        (answer,) = plaintext({"prompt": "x"}).render([End(None, {}, ERROR)])
        assert json.loads(str(answer["error"])) == {"error": ERROR}
