"""What an answer looks like in each of the three forms a job's input can have.

Owns the way from the engine's events to what the handler yields: sealed chunks
(SPEC sections 5 and 6), bare or as server-sent events (section 1.2), Fernet ciphertexts
(section 9), or the official worker's plaintext. Knows nothing of jobs or of the engine.
"""

import json
from collections.abc import Iterable
from typing import Any, Protocol

from crypto import AnswerSealer
from errors import Rejected, RequestError
from frames import AnswerEvent, Body, End, Event, FrameEncoder, Head, Note, Sse, Text, merge
from keys import Key
from protocol import PlaintextInput, Request
from simple_form import SimpleSealer


class Reply(Protocol):
    """Turns events into what is yielded; End is always the last of the last call."""

    def render(self, events: Iterable[AnswerEvent]) -> list[Any]:
        """Return what is yielded of these events; none where there is nothing to say yet."""


def rejection(as_events: bool) -> list[Any]:
    """Return what a request that cannot be opened is answered with (SPEC section 7)."""
    failure = {"error": Rejected.TEXT}
    # What the OpenAI route answers for a job that failed is the platform's secret.
    return [_event(Rejected.TEXT), failure] if as_events else [failure]


def _event(data: str) -> str:
    return f"data: {data}\n\n"


class SealedReply:
    """Chunks of the sealed protocol; one call, one chunk, unless a chunk cannot hold it.

    With `as_events` each is a server-sent event (SPEC section 1.2).
    """

    def __init__(self, request: Request, key: Key, *, as_events: bool = False) -> None:
        self.as_events = as_events
        self._frames = FrameEncoder()
        self._sealer = AnswerSealer(request, key)
        self._request, self._key = request, key
        self._note: Note | None = None

    def render(self, events: Iterable[AnswerEvent]) -> list[str]:
        events = list(events)
        if not events:
            return []
        if isinstance(events[0], Note):
            return self._seal_note(events[0])
        return self.seal(self._frames.encode(events), isinstance(events[-1], End))

    def payload(self, events: Iterable[AnswerEvent]) -> bytes:
        """Return the frames of `events`, to be sealed by `seal` (paced mode).

        A note takes the place of the next padding.
        """
        events = list(events)
        if events and isinstance(events[0], Note):
            self._note = events[0]
            return b""
        return self._frames.encode(events)

    def seal(self, payload: bytes, final: bool) -> list[str]:
        """Return the chunks of frames; of no frames a padding, or the note that waits."""
        if self._note and not payload and not final:
            note, self._note = self._note, None
            return self._seal_note(note)
        return self._chunks(self._sealer.seal(payload, final=final))

    def _seal_note(self, note: Note) -> list[str]:
        """Return a note, which is an attempt of its own (SPEC section 6)."""
        return self._chunks(
            AnswerSealer(self._request, self._key).seal(FrameEncoder().encode([note]))
        )

    def _chunks(self, chunks: list[str]) -> list[str]:
        return [_event(chunk) for chunk in chunks] if self.as_events else chunks

    def padding(self) -> list[str]:
        """Return a chunk that says nothing but that the job was taken."""
        return self.seal(b"", False)


class SimpleReply:
    """Fernet ciphertexts of JSON objects; details wait for the text before them."""

    def __init__(self, key: Key) -> None:
        self._sealer = SimpleSealer(key)
        self._finish: dict[str, Any] = {}

    def render(self, events: Iterable[AnswerEvent]) -> list[str]:
        objects: list[dict[str, Any]] = []
        for event in merge(events):
            match event:
                case Text(index, delta):
                    objects.append({"index": index, "text": delta} if index else {"text": delta})
                case Event(data):
                    self._finish |= {
                        name: data[name] for name in ("finish_reason",) if name in data
                    }
                    rest = {
                        name: value
                        for name, value in data.items()
                        if name not in ("finish_reason", "stop_reason")
                    }
                    if rest.keys() - {"index"}:
                        objects.append({"text": "", **rest})
                case End(usage, _, error):
                    end = {"done": True, **self._finish, "usage": usage}
                    end |= {"error": error} if error else {}
                    # The end travels with the last text where there is one.
                    if objects and "index" not in objects[-1]:
                        objects[-1] |= end
                    else:
                        objects.append({"text": "", **end})
        first = self._sealer.seq
        try:
            return [chunk for item in objects for chunk in self._sealer.seal_all(item)]
        except ValueError:
            self._sealer.seq = first  # of the error, which leaves instead of them
            raise RequestError(
                "a part of the answer is larger than a chunk of the simple form; "
                "ask for fewer log probabilities, or use the sealed form"
            ) from None


class PlaintextReply:
    """The official worker's answers, for ALLOW_PLAINTEXT."""

    def __init__(self, asked: PlaintextInput) -> None:
        self._stream = asked.stream
        self._native = asked.form == "generate"
        self._events: list[AnswerEvent] = []
        self._sse = False

    def render(self, events: Iterable[AnswerEvent]) -> list[Any]:
        events = list(events)
        end = events[-1] if events and isinstance(events[-1], End) else None
        if end is not None and end.error is not None:
            return [self._error(end.error)]
        self._sse |= any(isinstance(event, Head) and event.kind == "sse" for event in events)
        if self._sse:
            body = b"".join(event.data + b"\n\n" for event in events if isinstance(event, Sse))
            return [body.decode()] if body else []
        if self._native and self._stream:
            return self._batch(events, end)
        self._events += events
        if end is None:
            return []
        if self._native:
            return self._batch(self._events, end)
        return [json.loads(b"".join(e.data for e in self._events if isinstance(e, Body)) or b"{}")]

    def _error(self, error: dict[str, Any]) -> Any:
        fault = json.dumps({"error": error})
        if self._sse:
            return f"data: {fault}\n\n"
        # The platform shows the value of `error` as text: let that text be JSON.
        return {"error": fault}

    def _batch(self, events: list[AnswerEvent], end: End | None) -> list[Any]:
        texts: dict[int, str] = {}
        for event in events:
            if isinstance(event, Text):
                texts[event.index] = texts.get(event.index, "") + event.delta
        if not texts and end is None:
            return []
        batch: dict[str, Any] = {"choices": [{"tokens": [text]} for text in texts.values()]}
        if end is not None and end.usage is not None:
            usage = end.usage
            batch["usage"] = {"input": usage["prompt_tokens"], "output": usage["completion_tokens"]}
        return [batch]
