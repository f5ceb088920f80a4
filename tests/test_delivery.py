"""What a client believes of what the platform hands it (SPEC sections 5, 6 and 10)."""

import os
import struct
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import delivery
from crypto import AnswerOpener, AnswerSealer, OpenedChunk, new_request
from delivery import Delivery
from errors import (
    AnswerError,
    MissingChunk,
    RequestError,
    RestartedAnswer,
    SealedError,
    TamperedChunk,
    TruncatedAnswer,
)
from frames import AnswerEvent, Body, End, Event, FrameEncoder, Head, Note, Sse, Text, merge
from keys import Key

KEY = Key(bytes(range(32)))
REQUEST = new_request("generate", b"{}", audience="e", ttl_s=60)
HEAD = Head(200, "generate", "text/plain")
END = End({"total_tokens": 3}, {"total_ms": 1.0})
WORDS: list[AnswerEvent] = [HEAD, Text(0, "one"), Text(0, " two"), Text(0, " three"), END]
TEXT = "one two three"


def refusal(code: str) -> End:
    error = {"message": "m", "type": "t", "param": None, "code": code, "status": 409}
    return End(None, {}, error)


def seal(events: Sequence[AnswerEvent], *, final: bool = True) -> list[str]:
    """One attempt, a chunk per event."""
    sealer = AnswerSealer(REQUEST, KEY)
    encoder = FrameEncoder()
    last = len(events) - 1
    return [
        chunk
        for n, event in enumerate(events)
        for chunk in sealer.seal(encoder.encode([event]), final=final and n == last)
    ]


def new(*, streamed: bool = True) -> Delivery:
    return Delivery(AnswerOpener(REQUEST, KEY), streamed=streamed)


def text(events: list[AnswerEvent]) -> str:
    return "".join(event.delta for event in events if isinstance(event, Text))


@pytest.fixture(params=[True, False], ids=["streamed", "whole"])
def streamed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_events_come_out_as_they_went_in(streamed: bool) -> None:
    subject = new(streamed=streamed)
    assert subject.take(seal(WORDS)) == WORDS
    assert subject.ended


def test_a_streamed_answer_is_released_chunk_by_chunk_and_a_whole_one_at_its_end() -> None:
    streams, waits = new(), new(streamed=False)
    chunks = seal(WORDS)
    pieces = [streams.take([chunk]) for chunk in chunks]
    # The head commits to nothing, so it waits for what follows it.
    assert pieces == [[], WORDS[:2], [WORDS[2]], [WORDS[3]], [END]]
    assert [len(waits.take([chunk])) for chunk in chunks] == [0, 0, 0, 0, 5]


def test_frames_and_chunks_need_not_meet() -> None:
    sealer, encoder = AnswerSealer(REQUEST, KEY), FrameEncoder()
    whole = encoder.encode(WORDS)
    cuts = [whole[n : n + 7] for n in range(0, len(whole), 7)]
    chunks = [c for p in cuts[:-1] for c in [*sealer.seal(p), *sealer.seal(b"")]]
    subject = new()
    events = subject.take([*chunks, *sealer.seal(cuts[-1], final=True)])
    assert list(merge(events)) == list(merge(WORDS))


def test_equal_chunks_that_come_again_are_dropped(streamed: bool) -> None:
    chunks = seal(WORDS)
    doubled = [chunks[0], *chunks[:3], chunks[1], *chunks[2:], chunks[0]]
    assert text(new(streamed=streamed).take(doubled)) == TEXT


def test_chunks_out_of_order_are_put_in_order(streamed: bool) -> None:
    subject = new(streamed=streamed)
    assert text(subject.take(reversed(seal(WORDS)))) == TEXT
    assert subject.ended


def test_a_gap_holds_back_what_follows_until_it_is_filled() -> None:
    subject, chunks = new(), seal(WORDS)
    assert text(subject.take([*chunks[:2], *chunks[3:]])) == "one"
    assert not subject.ended
    assert isinstance(subject.fault(), MissingChunk)
    assert "chunk 2" in str(subject.fault())
    assert text(subject.take(chunks)) == " two three"
    assert subject.ended


def test_an_answer_without_its_end_is_truncated(streamed: bool) -> None:
    subject = new(streamed=streamed)
    subject.take(seal(WORDS)[:-1])
    assert not subject.ended
    assert isinstance(subject.fault(), TruncatedAnswer)
    assert isinstance(new().fault(), TruncatedAnswer)


def test_an_end_that_is_not_authenticated_as_the_last_chunk_is_no_end() -> None:
    with pytest.raises(AnswerError, match="form"):
        new().take(seal(WORDS, final=False))
    with pytest.raises(AnswerError, match="form"):
        new().take(seal(WORDS[:-1]))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda chunk: chunk[:-2] + ("A" if chunk[-2] != "A" else "B") + chunk[-1],
        lambda chunk: chunk[:60] + ("A" if chunk[60] != "A" else "B") + chunk[61:],
        lambda chunk: "2" + chunk[1:],
        lambda chunk: chunk.split(".")[2],
        lambda chunk: chunk + "\n",
        lambda chunk: "hello",
        lambda chunk: "",
        lambda chunk: {"text": "hello"},
        lambda chunk: ["hello"],
        lambda chunk: None,
    ],
)
def test_what_does_not_open_is_never_believed(spoil: Callable[[str], object]) -> None:
    chunks: list[object] = list(seal(WORDS))
    chunks[2] = spoil(str(chunks[2]))
    subject = new()
    with pytest.raises(TamperedChunk):
        subject.take(chunks)
    assert not subject.ended


def test_chunks_of_another_request_or_key_do_not_open() -> None:
    other = new_request("generate", b"{}", audience="e", ttl_s=60)
    for request, key in ((other, KEY), (REQUEST, Key(os.urandom(32)))):
        strange = AnswerSealer(request, key).seal(FrameEncoder().encode(WORDS), final=True)
        with pytest.raises(TamperedChunk):
            new().take(strange)


def test_two_different_chunks_of_one_number_are_refused() -> None:
    salt = os.urandom(16)
    first = AnswerSealer(REQUEST, KEY, salt=salt).seal(FrameEncoder().encode([Text(0, "yes")]))
    second = AnswerSealer(REQUEST, KEY, salt=salt).seal(FrameEncoder().encode([Text(0, "no")]))
    with pytest.raises(TamperedChunk, match="number 0"):
        new().take([*first, *second])


@pytest.mark.parametrize("final_first", [True, False])
def test_nothing_comes_after_the_end(final_first: bool) -> None:
    salt = os.urandom(16)
    end = AnswerSealer(REQUEST, KEY, salt=salt)
    end.seal(FrameEncoder().encode([HEAD]))
    last = end.seal(FrameEncoder().encode([END]), final=True)
    more = AnswerSealer(REQUEST, KEY, salt=salt)
    later = [more.seal(b"") for _ in range(3)][2]
    chunks = [*last, *later] if final_first else [*later, *last]
    with pytest.raises(TamperedChunk, match="after its end"):
        new().take(chunks)


def test_a_new_attempt_is_followed_before_anything_was_delivered(streamed: bool) -> None:
    dead, alive = seal(WORDS)[:1], seal(WORDS)
    subject = new(streamed=streamed)
    assert text(subject.take([*dead, *alive])) == TEXT
    assert subject.ended


def test_padding_alone_delivers_nothing() -> None:
    dead = AnswerSealer(REQUEST, KEY).seal(b"")
    assert text(new().take([*dead, *seal(WORDS)])) == TEXT


def test_notes_are_told_and_are_no_part_of_the_answer(streamed: bool) -> None:
    first, late = (seal([Note(words)], final=False) for words in ("loading", "late"))
    subject, chunks = new(streamed=streamed), seal(WORDS)
    assert subject.take(first) == []
    assert subject.note == "loading"
    events = subject.take([*chunks[:3], *late, *first, *chunks[3:]])
    assert events == WORDS
    assert subject.ended


def test_a_note_changes_nothing_of_what_is_wrong() -> None:
    note = seal([Note("loading")], final=False)
    subject = new()
    subject.take(note)
    assert isinstance(subject.fault(), TruncatedAnswer)
    subject.take(seal([refusal("replayed")]))
    assert "m" in str(subject.fault()) and isinstance(subject.fault(), RequestError)
    subject.take(seal(WORDS)[:2])
    assert isinstance(subject.fault(), TruncatedAnswer)


def test_an_answer_that_begins_with_a_note_is_refused() -> None:
    with pytest.raises(AnswerError, match="form"):
        new().take(seal([Note("loading"), *WORDS[1:]]))
    with pytest.raises(AnswerError, match="form"):
        new().take(seal([Note("loading")], final=True))


def test_a_new_attempt_after_delivery_is_an_error_that_says_so() -> None:
    dead, alive = seal(WORDS)[:3], seal(WORDS)
    subject = new()
    assert text(subject.take(dead)) == "one two"
    with pytest.raises(RestartedAnswer, match="again"):
        subject.take(alive)


def test_a_new_attempt_is_judged_by_its_first_frame() -> None:
    begun, refused = seal(WORDS), seal([refusal("already_running")])
    for other in ([], AnswerSealer(REQUEST, KEY).seal(b""), seal(WORDS)[:1], seal(WORDS)[2:3]):
        subject = new()
        assert text(subject.take([*begun[:3], *other, *refused, *begun[3:]])) == TEXT
        assert subject.ended


def test_an_attempt_that_said_something_is_not_one_that_points_at_another() -> None:
    begun, other = seal(WORDS)[:3], seal([Text(0, "uno"), refusal("replayed")])
    with pytest.raises(RestartedAnswer):
        new().take([*begun, *other])
    for streamed in (True, False):
        subject = new(streamed=streamed)
        assert text(subject.take(other)) == "uno"
        assert subject.ended


def test_what_is_left_of_two_attempts_is_a_restarted_answer() -> None:
    subject = new()
    subject.take([*seal(WORDS)[:3], seal(WORDS)[4]])
    assert isinstance(subject.fault(), RestartedAnswer)


def test_several_refusals_are_the_first_ones_error() -> None:
    subject = new()
    subject.take([*seal([refusal("already_running")]), *seal([refusal("replayed")])])
    fault = subject.fault()
    assert isinstance(fault, RequestError) and fault.code == "already_running"


def test_the_end_is_the_last_byte_of_the_final_chunk() -> None:
    payload = FrameEncoder().encode(WORDS)
    early = AnswerSealer(REQUEST, KEY)
    with pytest.raises(AnswerError, match="final chunk"):
        new().take([*early.seal(payload), *early.seal(b"", final=True)])
    cut = AnswerSealer(REQUEST, KEY)
    chunks = [*cut.seal(payload[:-1]), *cut.seal(payload[-1:], final=True)]
    assert text(new().take(chunks)) == TEXT


def test_a_whole_answer_follows_whichever_attempt_ends() -> None:
    dead, alive = seal(WORDS)[:4], seal(WORDS)
    subject = new(streamed=False)
    mixed = [dead[0], alive[0], *dead[1:], *alive[1:]]
    assert subject.take(mixed) == WORDS


@pytest.mark.parametrize("code", ["already_running", "replayed"])
def test_an_attempt_that_only_points_at_another_is_ignored(code: str, streamed: bool) -> None:
    chunks = seal(WORDS)
    for at in range(len(chunks)):
        subject = new(streamed=streamed)
        assert text(subject.take([*chunks[:at], *seal([refusal(code)]), *chunks[at:]])) == TEXT
        assert subject.ended


def test_such_an_attempt_alone_is_its_error() -> None:
    subject = new()
    assert subject.take(seal([refusal("replayed")])) == []
    fault = subject.fault()
    assert isinstance(fault, RequestError) and fault.code == "replayed" and fault.status == 409


def test_such_an_attempt_does_not_excuse_a_truncated_one() -> None:
    subject = new()
    subject.take([*seal(WORDS)[:3], *seal([refusal("already_running")])])
    assert isinstance(subject.fault(), TruncatedAnswer)


def test_other_errors_are_answers() -> None:
    subject = new()
    assert subject.take(seal([refusal("expired")])) == [refusal("expired")]
    assert subject.ended


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack(">BI", 99, 0),
        struct.pack(">BI", 2, 1) + b"x",
        struct.pack(">BI", 2, 3) + b"\0\0\xff",
        struct.pack(">BI", 6, 2) + b"\0\7",
        struct.pack(">BI", 1, 2) + b"{}",
        struct.pack(">BI", 8, 4) + b"nope",
    ],
)
def test_an_authentic_answer_of_unknown_form_is_an_error(payload: bytes) -> None:
    with pytest.raises(AnswerError, match="same version"):
        new().take(AnswerSealer(REQUEST, KEY).seal(payload))


def test_every_kind_of_event_passes() -> None:
    events: list[AnswerEvent] = [
        Head(200, "sse", "text/event-stream"),
        Event({"index": 0, "reasoning": "hm"}),
        Body(b"\0\1"),
        Sse(b'data: {"choices":[{"delta":{"content":"a"}}]}'),
        Sse(b'data: {"choices":[{"delta":{"content":"b"}}]}'),
        END,
    ]
    assert new().take(seal(events)) == events


class Naive:
    """What Delivery would be without its rules: decodes whatever opens, in the order it comes."""

    def __init__(self, opener: AnswerOpener, *, streamed: bool) -> None:
        self._opener = opener
        self._attempt = delivery._Attempt()
        self.ended = False

    def take(self, chunks: list[str]) -> list[AnswerEvent]:
        events: list[AnswerEvent] = []
        for chunk in chunks:
            opened: OpenedChunk = self._opener.open(chunk)
            events += self._attempt._decoder.feed(opened.payload)
        self.ended = True
        return events

    def fault(self) -> SealedError:
        return TruncatedAnswer("")


def hostile(kind: type[Delivery] | type[Naive], chunks: list[str], order: list[int]) -> str | None:
    """Return the text that an order of chunks is taken for, None where it is refused."""
    subject = kind(AnswerOpener(REQUEST, KEY), streamed=True)
    try:
        events = subject.take([chunks[n % len(chunks)] for n in order])
    except (SealedError, ValueError):
        return None
    return text(events) if subject.ended else None


@settings(deadline=None)
@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=16))
def test_no_loss_repetition_or_order_makes_another_answer(order: list[int]) -> None:
    complete = set(order) == set(range(len(WORDS)))
    assert hostile(Delivery, seal(WORDS), order) == (TEXT if complete else None)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2 * len(WORDS) - 1), max_size=20))
def test_nor_do_two_attempts_mixed(order: list[int]) -> None:
    other: list[AnswerEvent] = [HEAD, Text(0, "uno"), Text(0, " dos"), Text(0, " tres"), END]
    assert hostile(Delivery, seal(WORDS) + seal(other), order) in (TEXT, "uno dos tres", None)


def test_those_two_tests_can_fail() -> None:
    assert hostile(Naive, seal(WORDS), [0, 1, 3, 4]) == "one three"
    assert hostile(Naive, seal(WORDS), [0, 1, 1, 2, 3, 4]) == "oneone two three"
