"""Copies of the project's checks, each weakened in one place, on which an attack has to succeed.

Each of them is what somebody would write who had not thought of the attack.
"""

import base64
import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgspec
import pytest
from cryptography.fernet import Fernet, InvalidToken

import crypto
import delivery
import fernets
import job
import protocol
import simple_form
from config import Settings
from crypto import AnswerOpener, Opened, OpenedChunk, RequestOpener
from delivery import Delivery
from errors import TamperedChunk, TruncatedAnswer
from frames import AnswerEvent, End, FrameDecoder, Head, Text
from keys import Key, KeyId
from protocol import Request
from replay_guard import ReplayGuard
from tests.attack import hostile

Weakening = Callable[[pytest.MonkeyPatch], None]

REAL_OPEN = RequestOpener._open
REAL_PARSE_CHUNK = crypto._parse_chunk


def nothing(*_args: Any, **_options: Any) -> None:
    return None


def opened_if_known(self: RequestOpener, sealed: Any) -> Opened | None:
    """Open a request, but look for the key first, as one would write it at first."""
    kid = str(sealed).split(".")[1:2]
    if not kid or self._keys.get(kid[0]) is None:
        return None
    return REAL_OPEN(self, sealed)


def opened_plainly(self: RequestOpener, sealed: Any) -> Opened:
    """Open a request with no thought of what else it might be: fails in many ways."""
    version, kid, ciphertext = sealed.split(".")
    key = self._keys.get(kid)
    if key is None or version != "1":
        raise KeyError("no such key")
    inside = key.request_fernet.decrypt(ciphertext)
    return Opened(protocol.parse_request(protocol.unpad_request(inside)), key)


def is_decodable(text: str) -> bool:
    """Whether the base64 decoder takes it, however it is spelt."""
    try:
        base64.urlsafe_b64decode(text)
    except ValueError:
        return False
    return True


# --- the client -----------------------------------------------------------------------------


class NaiveDelivery(Delivery):
    """Decodes whatever opens in the order in which it comes, until the platform has no more."""

    def __init__(self, opener: delivery.Opener, *, streamed: bool) -> None:
        super().__init__(opener, streamed=streamed)
        self._decoder = FrameDecoder()
        self._seen: set[str] = set()

    def take(self, chunks: Iterable[Any]) -> list[AnswerEvent]:
        events: list[AnswerEvent] = []
        items = list(chunks)
        if {repr(item) for item in items} <= self._seen:
            self.ended = True
            return [Head(200, "generate", ""), End(None, {})]
        for item in items:
            self._seen.add(repr(item))
            events += self._read(item)
        self.ended = self._decoder.ended
        return events

    def _read(self, item: Any) -> list[AnswerEvent]:
        try:
            return self._decoder.feed(self._opener.open(item).payload)
        except ValueError as error:
            raise TamperedChunk from error

    def fault(self) -> TruncatedAnswer:
        return TruncatedAnswer("")


class TrustingDelivery(NaiveDelivery):
    """Takes what does not open for text that need not be opened."""

    def _read(self, item: Any) -> list[AnswerEvent]:
        try:
            return super()._read(item)
        except TamperedChunk:
            return [Text(0, str(item))]


def naive(patch: pytest.MonkeyPatch) -> None:
    """A client that trusts the platform for order and completeness."""
    patch.setattr(job, "Delivery", NaiveDelivery)


def trusting(patch: pytest.MonkeyPatch) -> None:
    """A client that also reads plaintext, so that it works with any worker."""
    patch.setattr(job, "Delivery", TrustingDelivery)


def one_answer_key(patch: pytest.MonkeyPatch) -> None:
    """Answers of all requests under one key, however many clients there are."""

    def response_fernet(self: KeyId, *_: Any) -> Fernet:
        return fernets.fernet(bytes(32))

    def attempt(self: AnswerOpener, salt_text: str) -> tuple[bytes, Fernet]:
        return salt_text.encode(), fernets.fernet(bytes(32))

    naive(patch)
    patch.setattr(KeyId, "response_fernet", response_fernet)
    patch.setattr(AnswerOpener, "_attempt", attempt)


def unauthenticated(patch: pytest.MonkeyPatch) -> None:
    """Encryption without authentication."""
    patch.setattr(Fernet, "_verify_signature", nothing)


def both_directions(patch: pytest.MonkeyPatch) -> None:
    """One key for requests and answers, and parsers that find what they look for anywhere."""

    def find(inside: bytes) -> bytes:
        start = inside.find(b'{"request_id"')
        if start < 0:
            raise ValueError("no request")
        _, end = json.JSONDecoder().raw_decode(inside[start:].decode(errors="replace"))
        return inside[start : start + end]

    def any_chunk(salt: bytes, inside: bytes) -> OpenedChunk:
        return REAL_PARSE_CHUNK(salt, inside) or OpenedChunk(salt, 0, True, b"")

    naive(patch)
    patch.setattr(Key, "response_fernet", lambda self, *_: self.request_fernet)
    patch.setattr(crypto, "unpad_request", find)
    patch.setattr(crypto, "_parse_chunk", any_chunk)


# --- the worker -----------------------------------------------------------------------------


def plaintext_too(patch: pytest.MonkeyPatch) -> None:
    """A worker that also serves who does not seal, so that every client works."""
    patch.setattr(hostile, "Settings", partial(Settings, allow_plaintext=True))


def any_version(patch: pytest.MonkeyPatch) -> None:
    """A worker that reads every version as its own."""

    def read(self: RequestOpener, sealed: Any) -> Opened | None:
        _, dot, rest = str(sealed).partition(".")
        return REAL_OPEN(self, f"1{dot}{rest}")

    patch.setattr(RequestOpener, "_open", read)


def telling(patch: pytest.MonkeyPatch) -> None:
    """A worker that says what was wrong, as one would to be helpful."""
    said: list[str] = []

    def read(self: RequestOpener, sealed: Any) -> Opened | None:
        try:
            return opened_plainly(self, sealed)
        except (InvalidToken, KeyError, ValueError, TypeError, AttributeError) as error:
            said[:] = [repr(error)]
            return None

    patch.setattr(RequestOpener, "_open", read)
    patch.setattr("rp_handler.rejection", lambda as_events: [{"error": f"rejected: {said}"}])


def early_exit(patch: pytest.MonkeyPatch) -> None:
    """A worker that looks for the key before it does any work."""
    patch.setattr(RequestOpener, "_open", opened_if_known)


def crashing(patch: pytest.MonkeyPatch) -> None:
    """A worker that expects an unknown key or InvalidToken, and nothing else."""

    def read(self: RequestOpener, sealed: Any) -> Opened | None:
        try:
            return opened_plainly(self, sealed)
        except (InvalidToken, KeyError):
            return None

    patch.setattr(RequestOpener, "_open", read)


def any_base64(patch: pytest.MonkeyPatch) -> None:
    """Whatever the base64 decoder takes."""
    for module in (crypto, simple_form, fernets):
        patch.setattr(module, "is_canonical", is_decodable)


def anyone_anytime(patch: pytest.MonkeyPatch) -> None:
    """Neither the endpoint nor the time is looked at, as with plain Fernet."""
    patch.setattr(RequestOpener, "check", nothing)
    real = simple_form._open_simple

    def any_time(keys: Any, text: Any, max_ttl_s: int, clock_skew_s: int, _now: int) -> Any:
        issued_at = int.from_bytes(base64.urlsafe_b64decode(text)[1:9], "big")
        return real(keys, text, max_ttl_s, clock_skew_s, issued_at)

    patch.setattr(simple_form, "_open_simple", any_time)


def forgetful(patch: pytest.MonkeyPatch) -> None:
    """What was answered is not remembered."""
    patch.setattr(ReplayGuard, "finish", ReplayGuard.abandon)


def careless(patch: pytest.MonkeyPatch) -> None:
    """What runs is not remembered either."""
    patch.setattr(ReplayGuard, "begin", nothing)


def unforgiving(patch: pytest.MonkeyPatch) -> None:
    """What was begun counts as answered, even where the answer never came."""
    patch.setattr(ReplayGuard, "abandon", ReplayGuard.finish)


def any_size(patch: pytest.MonkeyPatch) -> None:
    """No limit on what is decoded."""
    patch.setattr(crypto, "MAX_REQUEST_BYTES", 1 << 40)


def any_depth(patch: pytest.MonkeyPatch) -> None:
    """The standard library's JSON, which recurses."""

    def parse(data: bytes, kind: type[Request] = Request) -> Request:
        json.loads(data)
        return msgspec.json.decode(data, type=kind)

    patch.setattr(crypto, "parse_request", parse)


def any_length(patch: pytest.MonkeyPatch) -> None:
    """The length that is told is believed, and room made for it."""

    def read(inside: bytes) -> bytes:
        length = int.from_bytes(inside[:4], "big")
        room = bytearray(min(length, 1 << 26))
        room[: len(inside) - 4] = inside[4 : 4 + length]
        return bytes(room)

    patch.setattr(crypto, "unpad_request", read)
