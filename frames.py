"""The answer's frames: how events become payload bytes and how they come back (SPEC section 6).

Owns the framing and the templates that let constant JSON travel once. Knows
nothing of encryption, of chunks or of where events come from.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from protocol import strict_json

Kind = Literal["generate", "body", "sse"]

HEAD, TEXT, EVENT, BODY, TEMPLATE, FILL, SSE, END = range(1, 9)

NOTE_STATUS = 102
"""HTTP's "Processing": the status of the HEAD that is a note (SPEC section 6)."""

MAX_TEMPLATES = 64
"""Templates per answer (SPEC section 6); past it events travel in full."""

_FRAME = struct.Struct(">BI")
_INDEX = struct.Struct(">H")

_STRING = rb'[^"\\]*+(?:\\.[^"\\]*+)*+'

# The parts of a streamed event that change from one to the next: pieces of the
# model's text in any of the routes' spellings, and the responses route's counter.
_HOLE = re.compile(
    rb'"(?:content|text|delta|reasoning|reasoning_content|thinking|arguments|partial_json)":"'
    rb"(" + _STRING + rb')"|"sequence_number":(\d+)'
)
_INSIDE_STRING = re.compile(_STRING)


@dataclass(frozen=True, slots=True)
class Head:
    """How an answer begins; `status` is the HTTP status of the route."""

    status: int
    kind: Kind
    content_type: str


@dataclass(frozen=True, slots=True)
class Note:
    """A word on how the wait for an answer goes; alone in an attempt of its own."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """The next piece of a choice's text."""

    index: int
    delta: str


@dataclass(frozen=True, slots=True)
class Event:
    """Everything else of a `generate` answer (SPEC section 8.1)."""

    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Body:
    """The next piece of an HTTP body."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Sse:
    """One server-sent event: its lines without the blank one that ends it."""

    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    """The authenticated end; `error` has OpenAI's members and `status`."""

    usage: dict[str, Any] | None
    timings: dict[str, Any]
    error: dict[str, Any] | None = None


AnswerEvent = Head | Note | Text | Event | Body | Sse | End


def _frame(kind: int, data: bytes) -> bytes:
    return _FRAME.pack(kind, len(data)) + data


class FrameEncoder:
    """Turns the events of one attempt into payload bytes; keeps the templates it has defined."""

    def __init__(self) -> None:
        self._templates: dict[tuple[bytes, ...], bytes] = {}
        self._last = (b"\0", b"\0", b"")

    def encode(self, events: Iterable[AnswerEvent]) -> bytes:
        """Return the frames of `events`; neighbouring texts of one choice become one frame."""
        return b"".join(map(self._encode, merge(events)))

    def _encode(self, event: AnswerEvent) -> bytes:
        match event:
            case Text(index, delta):
                # A lone surrogate, if one ever came, would end the answer: send `?` for it.
                return _frame(TEXT, _INDEX.pack(index) + delta.encode(errors="replace"))
            case Sse(data):
                return self._encode_sse(data)
            case Body(data):
                return _frame(BODY, data)
            case Event(data):
                return _frame(EVENT, msgspec.json.encode(data))
            case Head(status, kind, content_type):
                head = {"status": status, "kind": kind, "content_type": content_type}
                return _frame(HEAD, msgspec.json.encode(head))
            case Note(text):
                note = {"status": NOTE_STATUS, "kind": "body", "content_type": "", "note": text}
                return _frame(HEAD, msgspec.json.encode(note))
            case End(usage, timings, error):
                end = {"usage": usage, "timings": timings, "error": error}
                return _frame(END, msgspec.json.encode(end))

    def _encode_sse(self, data: bytes) -> bytes:
        try:
            data.decode()
        except UnicodeDecodeError:
            # Event streams are UTF-8; who reads one sees the same replacement characters.
            data = data.decode(errors="replace").encode()
        if b"\0" in data:
            return _frame(SSE, data)
        # Most events repeat the one before but for one text: compare both ends, skip the search.
        prefix, suffix, number = self._last
        end = len(data) - len(suffix)
        if end >= len(prefix) and data.startswith(prefix) and data.endswith(suffix):
            hole = data[len(prefix) : end]
            if b'"' not in hole or _INSIDE_STRING.fullmatch(hole):
                return _frame(FILL, number + hole)
        pieces, holes = _split(data)
        if not holes:
            return _frame(SSE, data)
        definition = b""
        known = self._templates.get(pieces)
        if known is None:
            if len(self._templates) == MAX_TEMPLATES:
                return _frame(SSE, data)
            known = self._templates[pieces] = _INDEX.pack(len(self._templates))
            definition = _frame(TEMPLATE, b"\0".join(pieces))
        if len(holes) == 1:
            self._last = (pieces[0], pieces[1], known)
        return definition + _frame(FILL, known + b"\0".join(holes))


def _split(data: bytes) -> tuple[tuple[bytes, ...], list[bytes]]:
    pieces, holes, start = [], [], 0
    for match in _HOLE.finditer(data):
        hole_start, hole_end = match.span(match.lastindex or 0)
        pieces.append(data[start:hole_start])
        holes.append(data[hole_start:hole_end])
        start = hole_end
    return (*pieces, data[start:]), holes


class FrameDecoder:
    """Turns the payloads of one attempt back into events; ValueError for anything malformed."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._templates: list[list[bytes]] = []
        self._begun = False
        self._is_note = False
        self.ended = False

    def feed(self, payload: bytes) -> list[AnswerEvent]:
        """Return the events that `payload` completes."""
        self._buffer += payload
        return list(self._drain())

    @property
    def pending(self) -> bool:
        """Whether part of a frame is still missing."""
        return bool(self._buffer)

    def _drain(self) -> Iterator[AnswerEvent]:
        start = 0
        while len(self._buffer) - start >= _FRAME.size:
            kind, length = _FRAME.unpack_from(self._buffer, start)
            end = start + _FRAME.size + length
            if end > len(self._buffer):
                break
            if self.ended:
                raise ValueError("a frame after END")
            if kind == HEAD and self._begun:
                raise ValueError("a HEAD after another frame")
            if self._is_note:
                raise ValueError("a frame after a note")
            event = self._decode(kind, bytes(self._buffer[start + _FRAME.size : end]))
            self._begun = True
            start = end
            if event is not None:
                yield event
        del self._buffer[:start]

    def _decode(self, kind: int, data: bytes) -> AnswerEvent | None:
        match kind:
            case 1:
                return self._head(strict_json(data))
            case 2:
                return Text(_index(data), data[_INDEX.size :].decode())
            case 3:
                return Event(msgspec.convert(strict_json(data), dict[str, Any]))
            case 4:
                return Body(data)
            case 5:
                if len(self._templates) == MAX_TEMPLATES:
                    raise ValueError("too many templates")
                data.decode()
                pieces = data.split(b"\0")
                if len(pieces) < 2:
                    raise ValueError("a template without a hole")
                self._templates.append(pieces)
                return None
            case 6:
                data[_INDEX.size :].decode()
                return Sse(self._fill(_index(data), data[_INDEX.size :].split(b"\0")))
            case 7:
                data.decode()
                return Sse(data)
            case 8:
                value = msgspec.convert(strict_json(data), dict[str, Any])
                if "error" not in value:
                    raise ValueError("END without `error`")
                end = msgspec.convert(value, End)
                self.ended = True
                return end
            case _:
                raise ValueError(f"unknown frame type {kind}")

    def _head(self, value: Any) -> Head | Note:
        head = msgspec.convert(value, Head)
        if head.status != NOTE_STATUS:
            return head
        self._is_note = True
        return Note(msgspec.convert(value.get("note"), str))

    def _fill(self, number: int, holes: list[bytes]) -> bytes:
        if number >= len(self._templates):
            raise ValueError("a FILL of a template that was not defined")
        pieces = self._templates[number]
        if len(holes) != len(pieces) - 1:
            raise ValueError("a FILL that does not fit its template")
        return b"".join(part for pair in zip(pieces, [*holes, b""], strict=True) for part in pair)


def _index(data: bytes) -> int:
    if len(data) < _INDEX.size:
        raise ValueError("a frame without its index")
    number: int = _INDEX.unpack_from(data)[0]
    return number


def merge(events: Iterable[AnswerEvent]) -> Iterator[AnswerEvent]:
    """Join neighbouring texts of one choice, and neighbouring pieces of a body."""
    # Runs for every token: plain type tests cost a third of class patterns.
    index: int | None = None
    deltas: list[str] = []
    pieces: list[bytes] = []
    for event in events:
        if deltas and not (isinstance(event, Text) and event.index == index):
            yield Text(index or 0, "".join(deltas))
            deltas = []
        if pieces and not isinstance(event, Body):
            yield Body(b"".join(pieces))
            pieces = []
        if isinstance(event, Text):
            index = event.index
            deltas.append(event.delta)
        elif isinstance(event, Body):
            pieces.append(event.data)
        else:
            yield event
    if deltas:
        yield Text(index or 0, "".join(deltas))
    if pieces:
        yield Body(b"".join(pieces))
