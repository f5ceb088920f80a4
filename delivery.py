"""Delivery: from the chunks that the platform hands out to an answer's events (SPEC section 10).

Owns the order of chunks, what is dropped, what is waited for, which attempt is
followed, and the words for what went wrong. Knows nothing of HTTP, jobs or
clocks, and decides by authenticated content alone: the platform's word is never
part of it.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from crypto import OpenedChunk
from errors import (
    AnswerError,
    MissingChunk,
    RequestError,
    RestartedAnswer,
    SealedError,
    TamperedChunk,
    TruncatedAnswer,
)
from frames import AnswerEvent, End, FrameDecoder, Head, Note

_RESTARTED = (
    "the platform ran the job again after part of the answer had been delivered "
    "(its worker died, or the job was handed out twice); send the request again"
)


class Opener(Protocol):
    """Opens a chunk; TamperedChunk for what is not one."""

    def open(self, chunk: str) -> OpenedChunk:
        """Return what the chunk carries."""


def end_error(end: End) -> RequestError | None:
    """Return the error that an answer ended with."""
    if end.error is None:
        return None
    status = end.error.get("status")
    return RequestError.from_body({"error": end.error}, status if isinstance(status, int) else 500)


class _Attempt:
    """The chunks of one salt: one run of the job on one worker."""

    def __init__(self) -> None:
        self.events: list[AnswerEvent] = []
        self.end: End | None = None
        self.has_begun = False
        """Whether there is more than a head, which alone commits to nothing."""
        self.refused = False
        """Whether this attempt only says that another one is the answer (SPEC section 10)."""
        self.note: str | None = None
        """What it says instead of answering (SPEC section 6)."""
        self.next_seq = 0
        self.held: dict[int, OpenedChunk] = {}
        self._seen: dict[int, int] = {}
        self._last_seq: int | None = None
        self._decoder = FrameDecoder()

    def take(self, chunk: OpenedChunk, digest: int) -> None:
        seq = chunk.seq
        if seq in self._seen:
            if self._seen[seq] != digest:
                raise TamperedChunk(f"two different chunks of the answer have the number {seq}")
            return
        if chunk.final and max(self._seen, default=-1) > seq:
            raise TamperedChunk(f"the answer goes on after its end, chunk {seq}")
        if self._last_seq is not None and seq > self._last_seq:
            raise TamperedChunk(f"the answer goes on after its end, chunk {self._last_seq}")
        if chunk.final:
            self._last_seq = seq
        self._seen[seq] = digest
        self.held[seq] = chunk
        while (due := self.held.pop(self.next_seq, None)) is not None:
            self.next_seq += 1
            self._decode(due)

    def _decode(self, chunk: OpenedChunk) -> None:
        try:
            events = self._decoder.feed(chunk.payload)
            if chunk.final != self._decoder.ended or (chunk.final and self._decoder.pending):
                raise ValueError("END is not what the final chunk ends with")
        except (ValueError, msgspec.ValidationError) as error:
            raise AnswerError(
                "the worker's answer has a form that this client does not know "
                f"({error}); are worker and client of the same version?"
            ) from None
        if events and isinstance(events[0], Note):
            self.note = events[0].text
            return
        said = self.has_begun
        self.events += events
        self.has_begun = said or any(not isinstance(event, Head) for event in events)
        if chunk.final and isinstance(events[-1], End):
            self.end = events[-1]
            only_end = not said and all(isinstance(event, Head | End) for event in events)
            code = self.end.error.get("code") if self.end.error else None
            self.refused = only_end and code in ("already_running", "replayed")


class Delivery:
    """Collects the chunks of one answer and releases its events in order.

    With `streamed` false nothing is released before the authenticated end, so a
    job that is run again is followed however far the first attempt had come.
    """

    def __init__(self, opener: Opener, *, streamed: bool) -> None:
        self._opener = opener
        self._streamed = streamed
        self._attempts: dict[bytes, _Attempt] = {}
        self._followed: _Attempt | None = None
        self.ended = False
        self.note = ""
        """The last word on how the wait goes."""

    def take(self, chunks: Iterable[Any]) -> list[AnswerEvent]:
        """Return the events that `chunks` complete.

        Raises TamperedChunk for what does not open, RestartedAnswer when another attempt
        begins after events were released, AnswerError for an authentic but unknown form.
        """
        released: list[AnswerEvent] = []
        for chunk in chunks:
            if self.ended:
                break
            if not isinstance(chunk, str):
                raise TamperedChunk("the answer holds something that is not sealed")
            opened = self._opener.open(chunk)
            attempt = self._attempts.get(opened.salt)
            if attempt is None:
                attempt = self._attempts[opened.salt] = _Attempt()
            attempt.take(opened, hash(chunk))
            if attempt.note is not None:
                self.note = attempt.note
                continue
            released += self._release(attempt)
        return released

    def _release(self, attempt: _Attempt) -> list[AnswerEvent]:
        if attempt is not self._followed:
            if attempt.refused or not attempt.has_begun:
                return []
            if not self._streamed and attempt.end is None:
                return []
            if self._followed is not None:
                raise RestartedAnswer(_RESTARTED)
            self._followed = attempt
        self.ended = attempt.end is not None
        events, attempt.events = attempt.events, []
        return events

    def fault(self) -> SealedError:
        """Return what is wrong with an answer that did not reach its end and never will."""
        attempts = [attempt for attempt in self._attempts.values() if attempt.note is None]
        candidates = [attempt for attempt in attempts if not attempt.refused]
        if not candidates and attempts:
            refusal = attempts[0].end
            error = refusal and end_error(refusal)
            if error:
                return error
        if self._followed is not None and len(candidates) > 1:
            return RestartedAnswer(_RESTARTED)
        gaps = [attempt for attempt in candidates if attempt.held]
        if gaps:
            return MissingChunk(
                f"chunk {gaps[-1].next_seq} of the answer was lost on the way and the platform "
                "does not have it any more; send the request again"
            )
        return TruncatedAnswer(
            "the job ended without the authenticated end of its answer; "
            "what arrived is not the whole answer: send the request again"
        )
