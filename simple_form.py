"""The simple form, for clients that have Fernet and nothing else (SPEC.md section 9).

Owns both of its directions. Knows nothing of what a body means, of engines or of jobs.
"""

import base64
import binascii
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from cryptography.fernet import Fernet, InvalidToken

from errors import Rejected, TamperedChunk
from fernets import TIME_ZERO, is_canonical
from keys import Key, KeyRing
from protocol import CLOCK_SKEW_S, MAX_CHUNK_BYTES, MAX_REQUEST_BYTES, padded_size, strict_json

_TAG_BYTES = 32
# JSON escapes make at most 6 bytes of a character: half a chunk, and room for the rest.
_SIMPLE_TEXT_CHARS = MAX_CHUNK_BYTES // 12

_DECOY = Fernet(Fernet.generate_key())
"""Stands in for keys that are not good now: they cost the same as one that does not fit."""


@dataclass(frozen=True, slots=True)
class OpenedSimple:
    """An authenticated request of the simple form (SPEC section 9)."""

    body: bytes = field(repr=False)
    """A `generate` body as JSON; not yet checked."""
    key: Key
    replay_id: str
    """The ciphertext's own authentication tag, in hex."""
    expires_at: int


def open_simple(
    keys: KeyRing,
    encrypted_input: str,
    *,
    max_ttl_s: int,
    clock_skew_s: int = CLOCK_SKEW_S,
    now: Callable[[], float] = time.time,
) -> OpenedSimple:
    """Open a request of the simple form; Rejected, and nothing else, if it is not one of now."""
    opened = _open_simple(keys, encrypted_input, max_ttl_s, clock_skew_s, int(now()))
    if opened is None:
        raise Rejected
    return opened


def _open_simple(
    keys: KeyRing, encrypted_input: Any, max_ttl_s: int, clock_skew_s: int, now: int
) -> OpenedSimple | None:
    if not isinstance(encrypted_input, str) or len(encrypted_input) > MAX_REQUEST_BYTES:
        return None
    canonical = is_canonical(encrypted_input)
    if not canonical:
        encrypted_input = TIME_ZERO + "A" * (len(encrypted_input) // 4 * 4)
    found: tuple[Key, bytes] | None = None
    for key in keys:
        fernet = key.simple_fernet if key.terms.good_at(now) else _DECOY
        try:
            found = key, fernet.decrypt(encrypted_input)
        except InvalidToken:
            continue
    if found is None or not canonical:
        return None
    raw = base64.urlsafe_b64decode(encrypted_input)
    issued_at = int.from_bytes(raw[1:9], "big")
    expires_at = issued_at + max_ttl_s
    if not issued_at - clock_skew_s <= now <= expires_at:
        return None
    return OpenedSimple(
        body=_simple_body(found[1]),
        key=found[0],
        replay_id=raw[-_TAG_BYTES:].hex(),
        expires_at=expires_at,
    )


def _simple_body(content: bytes) -> bytes:
    # What begins like an object is never bare text: an answer sent back as a request is refused.
    if content.lstrip(b" \t\r\n").startswith(b"{"):
        return content
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content
    return msgspec.json.encode({"messages": [{"role": "user", "content": text}]})


class SimpleSealer:
    """Seals the answer to one request of the simple form."""

    def __init__(self, key: Key) -> None:
        self._fernet = key.simple_fernet
        self.seq = 0
        """The number of the next chunk; to be set back where chunks do not leave."""

    def seal(self, obj: dict[str, Any]) -> str:
        """Return the next chunk: `obj` with its `seq`, as padded JSON.

        ValueError for more than a chunk may hold; `seal_all` splits long text.
        """
        content = msgspec.json.encode({"seq": self.seq, **obj})
        if len(content) > MAX_CHUNK_BYTES:
            raise ValueError(f"a chunk holds at most {MAX_CHUNK_BYTES} bytes")
        self.seq += 1
        return self._fernet.encrypt(content.ljust(padded_size(len(content)), b" ")).decode()

    def seal_all(self, obj: dict[str, Any]) -> list[str]:
        """Return the chunks of `obj`, usually one; of a long `text` the last carries the rest."""
        chunks = []
        text = obj.get("text", "")
        while len(text) > _SIMPLE_TEXT_CHARS:
            piece, text = text[:_SIMPLE_TEXT_CHARS], text[_SIMPLE_TEXT_CHARS:]
            index = {"index": obj["index"]} if "index" in obj else {}
            chunks.append(self.seal({**index, "text": piece}))
        return [*chunks, self.seal({**obj, "text": text} if "text" in obj else obj)]


def open_simple_answer(key: Key, chunk: str) -> dict[str, Any]:
    """Open a chunk of a simple answer; TamperedChunk if it is not one."""
    try:
        answer = strict_json(key.simple_fernet.decrypt(chunk))
    except (InvalidToken, ValueError, TypeError, binascii.Error):
        answer = None
    if not isinstance(answer, dict) or "seq" not in answer:
        raise TamperedChunk("a chunk of the answer is not what the worker sealed")
    return answer
