"""Keys, sealing and opening (SPEC.md sections 2 to 5, 7 and 9); the only importer of cryptography.

Owns the pre-shared keys and everything derived from them, both directions of
the sealed form, the simple form and the guard against replays. Knows nothing of
what payloads mean (frames.py), of engines, of jobs or of the environment.

Clock and randomness are arguments, so the vectors can be reproduced.
"""

import base64
import binascii
import heapq
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from errors import ConfigError, OtherVersion, Rejected, RequestError, TamperedChunk
from protocol import (
    CELL_BYTES,
    CLOCK_SKEW_S,
    MAX_CHUNK_BYTES,
    MAX_REQUEST_BYTES,
    REQUEST_ID_BYTES,
    RESPONSE_SECRET_BYTES,
    SALT_BYTES,
    VERSION,
    Request,
    pad,
    pad_request,
    padded_size,
    parse_request,
    strict_json,
    unpad_request,
)

KEY_BYTES = 32

_LABEL = "sealed-vllm/1 "
_CHUNK_HEADER = struct.Struct(">IBI")
_FINAL = 1
_TAG_BYTES = 32
# JSON escapes make at most 6 bytes of a character: half a chunk, and room for the rest.
_SIMPLE_TEXT_CHARS = MAX_CHUNK_BYTES // 12
_MAX_NAME_CHARS = 32
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_MAX_NAME_CHARS - 1}}}")

_BASE64 = re.compile(r"[A-Za-z0-9_-]*+={0,2}")
# The last characters before one and before two `=` that leave no unused bit set.
_LAST = {1: frozenset("AEIMQUYcgkosw048"), 2: frozenset("AQgw")}

# How a Fernet ciphertext made at time 0 begins: the version byte and eight zero bytes.
_TIME_ZERO = "gAAAAAAAAAAA"


def _is_canonical(text: str) -> bool:
    """Whether `text` is what encoding its decoded bytes gives again (SPEC section 7)."""
    if len(text) % 4 or not _BASE64.fullmatch(text):
        return False
    pads = text[-2:].count("=")
    return not pads or text[-1 - pads] in _LAST[pads]


def b64(data: bytes) -> str:
    """Return URL-safe base64 without padding (SPEC section 1)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unb64(text: str, size: int) -> bytes:
    """Decode `b64` of exactly `size` bytes; ValueError for any other spelling."""
    padded = text + "=" * (-len(text) % 4)
    if text.endswith("=") or not _is_canonical(padded):
        raise ValueError("not canonical base64")
    data = base64.urlsafe_b64decode(padded)
    if len(data) != size:
        raise ValueError("wrong length")
    return data


def _hkdf(secret: bytes, info: str, salt: bytes | None = None) -> bytes:
    return HKDF(SHA256(), length=32, salt=salt, info=info.encode()).derive(secret)


def _fernet(secret: bytes) -> Fernet:
    return Fernet(base64.urlsafe_b64encode(secret))


def _sealed_length(inside_bytes: int) -> int:
    """Return how many characters Fernet makes of `inside_bytes`."""
    return 4 * -(-(57 + 16 * (inside_bytes // 16 + 1)) // 3)


_MAX_CIPHERTEXT_CHARS = _sealed_length(MAX_CHUNK_BYTES)
_SALT_CHARS = len(b64(bytes(SALT_BYTES)))
_CHUNK_PREFIX_CHARS = len(VERSION) + 1 + _SALT_CHARS + 1


def generate_key() -> str:
    """Return a new Fernet key from the system's random source."""
    return Fernet.generate_key().decode()


class Asked(Protocol):
    """The part of a request that its answer is sealed under."""

    @property
    def request_id(self) -> str:
        """The request's id."""

    @property
    def response_secret(self) -> str:
        """The request's response secret, as it travels."""


class KeyId:
    """The id of a key, which is all of the key that its answers are opened with."""

    __slots__ = ("id",)

    def __init__(self, id: str) -> None:
        self.id = id

    def response_fernet(self, request: Asked, salt: bytes) -> Fernet:
        """Return the Fernet of one attempt's response key (SPEC section 2)."""
        secret = _unb64(request.response_secret, RESPONSE_SECRET_BYTES)
        info = f"{_LABEL}response {self.id} {request.request_id}"
        return _fernet(_hkdf(secret, info, salt))


class Key(KeyId):
    """One pre-shared key and what SPEC section 2 derives from it."""

    __slots__ = ("_request", "_secret", "_simple", "name")

    def __init__(self, secret: bytes, name: str | None = None) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes")
        self._secret = secret
        self.name = name
        super().__init__(_hkdf(secret, _LABEL + "key-id")[:8].hex())
        self._request = _fernet(_hkdf(secret, f"{_LABEL}request {self.id}"))
        self._simple = _fernet(secret)

    @classmethod
    def parse(cls, text: str, name: str | None = None) -> "Key":
        """Read a Fernet key; ConfigError that says what is wrong and never quotes it."""
        try:
            return cls(_key_bytes(text), name)
        except ValueError as error:
            fault = f"the encryption key {error}"
        raise ConfigError([fault])

    @property
    def request_fernet(self) -> Fernet:
        """The Fernet of the request key."""
        return self._request

    @property
    def simple_fernet(self) -> Fernet:
        """The Fernet of the key itself, for the simple form only (SPEC section 9)."""
        return self._simple

    def local_secret(self, use: str) -> bytes:
        """Return 32 bytes for a `use` of the worker's own, none of which travels (section 2)."""
        return _hkdf(self._secret, f"{_LABEL}local {use}")

    def __repr__(self) -> str:
        return f"Key(id={self.id!r}, name={self.name!r})"

    def __reduce__(self) -> Any:
        raise TypeError("keys are not pickled")


def _key_bytes(text: str) -> bytes:
    """Decode a Fernet key; ValueError finishing the sentence "the key …"."""
    text = text.strip()
    hint = "make one with `python client.py keygen`"
    if not text:
        raise ValueError(f"is empty; {hint}")
    if not text.isascii() or text.strip("=").strip(_ALPHABET):
        raise ValueError(f"has characters other than A-Z a-z 0-9 - _ (and = at its end); {hint}")
    if len(text) != 44 or not text.endswith("=") or text.endswith("=="):
        raise ValueError(
            f"is not 44 characters of URL-safe base64 ending in one = (it has {len(text)}); {hint}"
        )
    if not _is_canonical(text):
        raise ValueError(f"is not canonical: its last character before = was altered; {hint}")
    return base64.urlsafe_b64decode(text)


_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


class KeyRing(Sequence[Key]):
    """The keys of a worker, in the order of its settings."""

    def __init__(self, keys: Sequence[Key]) -> None:
        if not keys:
            raise ValueError("a key ring holds at least one key")
        self._keys = tuple(keys)
        self._by_id = {key.id: key for key in keys}
        if len(self._by_id) != len(self._keys):
            raise ValueError("two keys are the same")

    @classmethod
    def parse(cls, text: str) -> "KeyRing":
        """Read `key` or `name=key,name2=key2`; ConfigError naming every fault, quoting nothing."""
        keys: list[Key] = []
        faults: list[str] = []
        by_id: dict[str, int] = {}
        by_name: dict[str, int] = {}
        entries = text.split(",")
        for number, entry in enumerate(entries, 1):
            which = "the encryption key" if len(entries) == 1 else f"encryption key {number}"
            name, _, rest = entry.strip().partition("=")
            # A key ends in `=` itself, so only what follows an `=` makes the part before it a name.
            named = bool(rest.strip("="))
            if named and not _NAME.fullmatch(name):
                faults.append(
                    f"{which} has a name that is not 1 to {_MAX_NAME_CHARS} of A-Z a-z 0-9 . _ -, "
                    "or a comma between two keys is missing"
                )
            elif named and by_name.setdefault(name, number) != number:
                faults.append(f"{which} has the same name as encryption key {by_name[name]}")
            try:
                key = Key(_key_bytes(rest if named else entry), name if named else None)
            except ValueError as error:
                faults.append(f"{which} {error}")
                continue
            if by_id.setdefault(key.id, number) != number:
                faults.append(f"{which} is the same as encryption key {by_id[key.id]}")
            keys.append(key)
        if faults:
            raise ConfigError(faults)
        return cls(keys)

    def get(self, kid: str) -> Key | None:
        """Return the key of that id."""
        return self._by_id.get(kid)

    @property
    def first(self) -> Key:
        """The first key."""
        return self._keys[0]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __getitem__(self, index: Any) -> Any:
        return self._keys[index]

    def __repr__(self) -> str:
        return f"KeyRing({list(self._keys)!r})"


def new_request(
    route: str,
    body: bytes | None,
    *,
    audience: str,
    ttl_s: int,
    method: Literal["POST", "GET"] = "POST",
    now: Callable[[], float] = time.time,
    random: Callable[[int], bytes] = os.urandom,
) -> Request:
    """Return a request with a fresh id and response secret (SPEC section 3).

    `body` is a JSON object or None. RequestError where a worker would reject the result.
    """
    issued_at = int(now())
    request = Request(
        request_id=random(REQUEST_ID_BYTES).hex(),
        response_secret=b64(random(RESPONSE_SECRET_BYTES)),
        issued_at=issued_at,
        expires_at=issued_at + ttl_s,
        audience=audience,
        route=route,
        method=method,
        body=msgspec.Raw(b"null" if body is None else body),
    )
    try:
        if body is not None:
            strict_json(body)
        parse_request(request.encode())
    except ValueError as error:
        raise RequestError(f"the request cannot be sent: {error}") from None
    return request


def seal_request(request: Request, key: Key) -> str:
    """Return `1.kid.ciphertext` (SPEC section 3); RequestError (413) past the size limit."""
    content = request.encode()
    size = len(VERSION) + len(key.id) + 2 + _sealed_length(padded_size(len(content) + 4))
    if size > MAX_REQUEST_BYTES:
        raise RequestError(
            f"the request is too large: sealed it has {size} characters, "
            f"a worker takes {MAX_REQUEST_BYTES}",
            status=413,
            code="too_large",
        )
    ciphertext = key.request_fernet.encrypt_at_time(pad_request(content), 0)
    return f"{VERSION}.{key.id}.{ciphertext.decode()}"


@dataclass(frozen=True, slots=True)
class Opened:
    """An authenticated request and the key it came under."""

    request: Request
    key: Key

    @property
    def replay_id(self) -> str:
        """What ReplayGuard knows the request by: no client can use up another one's ids."""
        return f"{self.key.id}.{self.request.request_id}"


class RequestOpener:
    """Opens sealed requests for one endpoint and checks whom and when they are for."""

    def __init__(
        self,
        keys: KeyRing,
        audience: str,
        *,
        max_ttl_s: int,
        clock_skew_s: int = CLOCK_SKEW_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._audience = audience
        self._max_ttl_s = max_ttl_s
        self._clock_skew_s = clock_skew_s
        self._now = now
        # Stands in for keys that the worker does not have, so that looking for one costs the same.
        self._decoy = Key(os.urandom(KEY_BYTES))

    def open(self, sealed: str) -> Opened:
        """Authenticate and decode a sealed request; Rejected, and nothing else, if it is not one.

        Nothing but size is looked at before the work of one HMAC over the whole length
        is done, whatever the fault (SPEC section 7).
        """
        opened = self._open(sealed)
        if opened is None:
            raise Rejected
        return opened

    def _open(self, sealed: Any) -> Opened | None:
        if not isinstance(sealed, str) or len(sealed) > MAX_REQUEST_BYTES:
            return None
        version, _, rest = sealed.partition(".")
        kid, _, ciphertext = rest.partition(".")
        key = self._keys.get(kid) if version == VERSION else None
        if not ciphertext.startswith(_TIME_ZERO) or not _is_canonical(ciphertext):
            key = None
            ciphertext = _TIME_ZERO + "A" * (len(sealed) // 4 * 4)
        try:
            inside = (key or self._decoy).request_fernet.decrypt(ciphertext)
            request = parse_request(unpad_request(inside))
            _unb64(request.response_secret, RESPONSE_SECRET_BYTES)
        except (InvalidToken, ValueError):
            return None
        return Opened(request, key) if key else None

    def check(self, request: Request) -> None:
        """Raise RequestError unless the request is for this endpoint and for now (SPEC section 4).

        Codes: `wrong_audience`, `not_yet_valid`, `expired`, `ttl_too_long`.
        """
        if request.audience != self._audience:
            raise RequestError(
                "the request is meant for another endpoint than this worker's; "
                "check the endpoint id that the client was given",
                status=403,
                code="wrong_audience",
            )
        now = int(self._now())
        early_s = request.issued_at - now
        if early_s > self._clock_skew_s:
            raise RequestError(
                f"the request was issued {early_s} s in the future; "
                f"set the client's clock (at most {self._clock_skew_s} s are tolerated)",
                code="not_yet_valid",
            )
        late_s = now - request.expires_at
        if late_s > self._clock_skew_s or request.expires_at <= request.issued_at:
            raise RequestError(
                f"the request expired {late_s} s ago, {now - request.issued_at} s after it was "
                "issued; it waited too long or the client's clock is wrong: send a new one",
                status=408,
                code="expired",
            )
        ttl_s = request.expires_at - request.issued_at
        if ttl_s > self._max_ttl_s:
            raise RequestError(
                f"the request is valid for {ttl_s} s; this worker accepts at most "
                f"{self._max_ttl_s} s",
                code="ttl_too_long",
            )


class ReplayGuard:
    """Remembers which requests run and which were answered, for as long as they are valid.

    What it has forgotten it refuses by date, so a clock that steps back opens no gap.
    Its memory is bounded; full, it refuses new requests rather than forget.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.time,
        max_entries: int = 1_000_000,
        clock_skew_s: int = CLOCK_SKEW_S,
    ) -> None:
        self._now = now
        self._max_entries = max_entries
        self._clock_skew_s = clock_skew_s
        self._running: dict[str, int] = {}
        self._finished: set[str] = set()
        self._by_expiry: list[tuple[int, str]] = []
        self._forgotten_until = -1

    def __len__(self) -> int:
        return len(self._running) + len(self._finished)

    def begin(self, request_id: str, expires_at: int) -> None:
        """Note that a request runs, or raise RequestError.

        Codes: `already_running`, `replayed`, `expired`, `replay_guard_full`.
        """
        self._forget()
        if request_id in self._running:
            raise RequestError(
                "the request is already running on this worker", status=409, code="already_running"
            )
        if request_id in self._finished:
            raise RequestError(
                "the request was already answered by this worker; send a new one",
                status=409,
                code="replayed",
            )
        if expires_at <= self._forgotten_until:
            raise RequestError(
                "the request has expired; send a new one", status=408, code="expired"
            )
        if len(self) >= self._max_entries:
            raise RequestError(
                "this worker remembers too many requests; use requests that expire sooner "
                "or try again later",
                status=503,
                code="replay_guard_full",
            )
        self._running[request_id] = expires_at

    def finish(self, request_id: str) -> None:
        """Note that a running request was answered to its end: it will not run again."""
        expires_at = self._running.pop(request_id, None)
        if expires_at is not None:
            self._finished.add(request_id)
            heapq.heappush(self._by_expiry, (expires_at, request_id))

    def abandon(self, request_id: str) -> None:
        """Note that a running request was not answered to its end: it may run again."""
        self._running.pop(request_id, None)

    def _forget(self) -> None:
        limit = self._now() - self._clock_skew_s - 1
        while self._by_expiry and self._by_expiry[0][0] < limit:
            expires_at, request_id = heapq.heappop(self._by_expiry)
            self._finished.discard(request_id)
            self._forgotten_until = max(self._forgotten_until, expires_at)


class AnswerSealer:
    """Seals the payloads of one attempt into chunks (SPEC section 5)."""

    def __init__(self, request: Request, key: Key, *, salt: bytes | None = None) -> None:
        salt = os.urandom(SALT_BYTES) if salt is None else salt
        if len(salt) != SALT_BYTES:
            raise ValueError(f"a salt has {SALT_BYTES} bytes")
        self._encrypt = key.response_fernet(request, salt).encrypt_at_time
        self._prefix = f"{VERSION}.{b64(salt)}."
        self._seq = 0
        self._ended = False

    def seal(self, payload: bytes, *, final: bool = False) -> list[str]:
        """Return the chunks of `payload`, usually one; with `final` the last is the end.

        An empty payload makes one chunk of padding. ValueError after the end.
        """
        if len(payload) <= MAX_PAYLOAD_BYTES:
            return [self._chunk(payload, final)]
        starts = range(0, len(payload), MAX_PAYLOAD_BYTES)
        return [
            self._chunk(payload[start : start + MAX_PAYLOAD_BYTES], final and start == starts[-1])
            for start in starts
        ]

    def _chunk(self, payload: bytes, final: bool) -> str:
        if self._ended:
            raise ValueError("the answer has ended")
        header = _CHUNK_HEADER.pack(self._seq, _FINAL if final else 0, len(payload))
        self._seq += 1
        self._ended = final
        return self._prefix + self._encrypt(pad(header, payload), 0).decode()


MAX_PAYLOAD_BYTES = MAX_CHUNK_BYTES - _CHUNK_HEADER.size
"""Longest payload of one chunk."""

CELL_PAYLOAD_BYTES = CELL_BYTES - _CHUNK_HEADER.size
"""Longest payload of a chunk of the smallest size."""


@dataclass(frozen=True, slots=True)
class OpenedChunk:
    """One authenticated chunk; `salt` names the attempt."""

    salt: bytes
    seq: int
    final: bool
    payload: bytes


class AnswerOpener:
    """Opens the chunks that answer one request, in any order and of any attempt."""

    def __init__(self, request: Asked, key: KeyId) -> None:
        self._request = request
        self._key = key
        self._attempts: dict[str, tuple[bytes, Fernet]] = {}

    def open(self, chunk: str) -> OpenedChunk:
        """Authenticate and decode one chunk; TamperedChunk, and nothing else, if it is not one."""
        opened = self._open(chunk)
        if opened is None:
            claimed = chunk.partition(".")[0] if isinstance(chunk, str) else ""
            if claimed.isdecimal() and claimed != VERSION:
                raise OtherVersion(
                    f"the answer says that it is of version {claimed[:9]} of the protocol, and "
                    f"this client speaks {VERSION}; bring worker and client to the same release"
                )
            raise TamperedChunk("a chunk of the answer is not what the worker sealed")
        return opened

    def _open(self, chunk: Any) -> OpenedChunk | None:
        if not isinstance(chunk, str) or len(chunk) > _CHUNK_PREFIX_CHARS + _MAX_CIPHERTEXT_CHARS:
            return None
        version, _, rest = chunk.partition(".")
        salt_text, _, ciphertext = rest.partition(".")
        if version != VERSION or not ciphertext.startswith(_TIME_ZERO):
            return None
        if not _is_canonical(ciphertext):
            return None
        try:
            attempt = self._attempts.get(salt_text)
            if attempt is None:
                salt = _unb64(salt_text, SALT_BYTES)
                attempt = salt, self._key.response_fernet(self._request, salt)
            inside = attempt[1].decrypt(ciphertext)
        except (InvalidToken, ValueError):
            return None
        # Only salts that opened something are kept: strangers cannot fill the memory.
        self._attempts[salt_text] = attempt
        return _parse_chunk(attempt[0], inside)


def _parse_chunk(salt: bytes, inside: bytes) -> OpenedChunk | None:
    if not _CHUNK_HEADER.size <= len(inside) <= MAX_CHUNK_BYTES:
        return None
    seq, flags, length = _CHUNK_HEADER.unpack_from(inside)
    end = _CHUNK_HEADER.size + length
    if flags > _FINAL or end > len(inside) or len(inside) != padded_size(end):
        return None
    if not inside.endswith(bytes(len(inside) - end)):
        return None
    return OpenedChunk(salt, seq, flags == _FINAL, inside[_CHUNK_HEADER.size : end])


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
    canonical = _is_canonical(encrypted_input)
    if not canonical:
        encrypted_input = _TIME_ZERO + "A" * (len(encrypted_input) // 4 * 4)
    found: tuple[Key, bytes] | None = None
    for key in keys:
        try:
            found = key, key.simple_fernet.decrypt(encrypted_input)
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
        self._seq = 0

    def seal(self, obj: dict[str, Any]) -> str:
        """Return the next chunk: `obj` with its `seq`, as padded JSON.

        ValueError for more than a chunk may hold; `seal_all` splits long text.
        """
        content = msgspec.json.encode({"seq": self._seq, **obj})
        if len(content) > MAX_CHUNK_BYTES:
            raise ValueError(f"a chunk holds at most {MAX_CHUNK_BYTES} bytes")
        self._seq += 1
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
