"""The sealed form: requests and the chunks of their answers (SPEC.md sections 3 to 5, 7 and 13).

Owns both directions, sealing and opening, and for whom and when a request is. Knows nothing
of what payloads mean (frames.py), of engines, of jobs or of the environment.

Clock and randomness are arguments, so the vectors can be reproduced.
"""

import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from cryptography.fernet import Fernet, InvalidToken

from errors import OtherVersion, Rejected, RequestError, TamperedChunk
from fernets import TIME_ZERO, b64, is_canonical, sealed_length, unb64
from hpke import (
    OVERHEAD_BYTES,
    PUBLIC_BYTES,
    SHARE_BYTES,
    Envelope,
    HpkeKeyRing,
    HpkePrivateKey,
    HpkePublicKey,
)
from keys import KEY_BYTES, Asked, Key, KeyId, KeyRing
from protocol import (
    CELL_BYTES,
    CLOCK_SKEW_S,
    MAX_CHUNK_BYTES,
    MAX_REQUEST_BYTES,
    REQUEST_ID_BYTES,
    RESPONSE_SECRET_BYTES,
    SALT_BYTES,
    VERSION,
    HpkeRequest,
    Request,
    pad,
    pad_request,
    padded_size,
    parse_request,
    strict_json,
    unpad_request,
)

_CHUNK_HEADER = struct.Struct(">IBI")
_FINAL = 1

_MAX_CIPHERTEXT_CHARS = sealed_length(MAX_CHUNK_BYTES)
_SALT_CHARS = len(b64(bytes(SALT_BYTES)))
_CHUNK_PREFIX_CHARS = len(VERSION) + 1 + _SALT_CHARS + 1
_SHARE_CHARS = len(b64(bytes(SHARE_BYTES)))

# Stands where the key id of a request stands that travels without an envelope.
_HPKE_PREFIX = f"{VERSION}.hpke."
_HPKE_INFO = b"sealed-vllm/1 hpke-request"


def new_request(
    route: str,
    body: bytes | None,
    *,
    audience: str,
    ttl_s: int,
    method: Literal["POST", "GET"] = "POST",
    envelope: Envelope | None = None,
    now: Callable[[], float] = time.time,
    random: Callable[[int], bytes] = os.urandom,
) -> Request:
    """Return a request with a fresh id and response secret (SPEC section 3).

    `body` is a JSON object or None; with `envelope` it is one of public-key mode (section 13.1).
    RequestError where a worker would reject the result.
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
    if envelope is not None:
        request = HpkeRequest(
            **msgspec.structs.asdict(request), reply_key=b64(envelope.reply_key.public.raw)
        )
    try:
        if body is not None:
            strict_json(body)
        parse_request(request.encode(), type(request))
    except ValueError as error:
        raise RequestError(f"the request cannot be sent: {error}") from None
    return request


def seal_request(request: Request, key: Key, envelope: Envelope | None = None) -> str:
    """Return `1.kid.ciphertext` (SPEC section 3); RequestError (413) past the size limit.

    A request of public-key mode is returned in its `envelope` (section 13.1), and never without.
    """
    if isinstance(request, HpkeRequest) != (envelope is not None):
        raise ValueError("a request of public-key mode, and no other, travels in an envelope")
    content = request.encode()
    size = len(VERSION) + len(key.id) + 2 + sealed_length(padded_size(len(content) + 4))
    if envelope:
        size = len(_HPKE_PREFIX) + -(-(size + OVERHEAD_BYTES) * 4 // 3)
    if size > MAX_REQUEST_BYTES:
        raise RequestError(
            f"the request is too large: sealed it has {size} characters, "
            f"a worker takes {MAX_REQUEST_BYTES}",
            status=413,
            code="too_large",
        )
    ciphertext = key.request_fernet.encrypt_at_time(pad_request(content), 0)
    sealed = f"{VERSION}.{key.id}.{ciphertext.decode()}"
    if envelope:
        return _HPKE_PREFIX + b64(envelope.worker_key.seal(sealed.encode(), _HPKE_INFO))
    return sealed


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
        hpke_keys: HpkeKeyRing | None = None,
        allow_without_hpke: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._hpke_keys = hpke_keys
        self.needs_hpke = hpke_keys is not None and not allow_without_hpke
        """Whether what comes without an envelope is rejected."""
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
        if self._hpke_keys is None:
            return self._open_bare(sealed, Request)
        if not sealed.startswith(_HPKE_PREFIX) and not self.needs_hpke:
            return self._open_bare(sealed, Request)
        return self._open_bare(self._unwrap(sealed, self._hpke_keys), HpkeRequest)

    def _unwrap(self, sealed: str, hpke_keys: HpkeKeyRing) -> str:
        """Return what an envelope holds, or something as long that no key opens."""
        size = len(sealed) * 3 // 4
        try:
            content: bytes | None = unb64(sealed.removeprefix(_HPKE_PREFIX))
        except ValueError:
            # As much is decoded: it is a part of the time that is taken.
            unb64("A" * (len(sealed) // 4 * 4))
            content = None
        if not sealed.startswith(_HPKE_PREFIX):
            content = None
        inside = hpke_keys.open(content, _HPKE_INFO, decoy_bytes=size)
        return "x" * max(0, size - OVERHEAD_BYTES) if inside is None else inside.decode("latin-1")

    def _open_bare(self, sealed: str, kind: type[Request]) -> Opened | None:
        version, _, rest = sealed.partition(".")
        kid, _, ciphertext = rest.partition(".")
        key = self._keys.get(kid) if version == VERSION else None
        if key and not key.terms.good_at(self._now()):
            key = None
        # Always, and of something as long as the whole: it is a part of the time that is taken.
        canonical = is_canonical(ciphertext or sealed)
        if not canonical or not ciphertext.startswith(TIME_ZERO):
            key = None
            ciphertext = TIME_ZERO + "A" * (len(sealed) // 4 * 4)
        try:
            inside = (key or self._decoy).request_fernet.decrypt(ciphertext)
            request = parse_request(unpad_request(inside), kind)
            unb64(request.response_secret, RESPONSE_SECRET_BYTES)
            if isinstance(request, HpkeRequest):
                _reply_key(request)
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


def _reply_key(request: HpkeRequest) -> HpkePublicKey:
    """Return the key that the answer is sealed to; ValueError if it is none."""
    return HpkePublicKey(unb64(request.reply_key, PUBLIC_BYTES))


class AnswerSealer:
    """Seals the payloads of one attempt into chunks (SPEC section 5).

    In public-key mode a share takes the place of the salt (section 13.2).
    """

    def __init__(self, request: Request, key: Key, *, salt: bytes | None = None) -> None:
        reply_secret = None
        if isinstance(request, HpkeRequest):
            salt, reply_secret = _reply_key(request).share(request.request_id)
        else:
            salt = os.urandom(SALT_BYTES) if salt is None else salt
            if len(salt) != SALT_BYTES:
                raise ValueError(f"a salt has {SALT_BYTES} bytes")
        self._encrypt = key.response_fernet(request, salt, reply_secret).encrypt_at_time
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
    """One authenticated chunk; `salt`, or what stands in its place, names the attempt."""

    salt: bytes
    seq: int
    final: bool
    payload: bytes


class AnswerOpener:
    """Opens the chunks that answer one request, in any order and of any attempt.

    With `reply_key`, which the answer to a request of public-key mode needs, no other opens.
    """

    def __init__(self, request: Asked, key: KeyId, reply_key: HpkePrivateKey | None = None) -> None:
        self._request = request
        self._key = key
        self._reply_key = reply_key
        more = _SHARE_CHARS - _SALT_CHARS if reply_key else 0
        self._max_chars = _CHUNK_PREFIX_CHARS + more + _MAX_CIPHERTEXT_CHARS
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
        if not isinstance(chunk, str) or len(chunk) > self._max_chars:
            return None
        version, _, rest = chunk.partition(".")
        salt_text, _, ciphertext = rest.partition(".")
        if version != VERSION or not ciphertext.startswith(TIME_ZERO):
            return None
        if not is_canonical(ciphertext):
            return None
        try:
            attempt = self._attempts.get(salt_text)
            if attempt is None:
                attempt = self._attempt(salt_text)
            inside = attempt[1].decrypt(ciphertext)
        except (InvalidToken, ValueError):
            return None
        # Only salts that opened something are kept: strangers cannot fill the memory.
        self._attempts[salt_text] = attempt
        return _parse_chunk(attempt[0], inside)

    def _attempt(self, salt_text: str) -> tuple[bytes, Fernet]:
        if self._reply_key is None:
            salt, reply_secret = unb64(salt_text, SALT_BYTES), None
        else:
            salt = unb64(salt_text, SHARE_BYTES)
            reply_secret = self._reply_key.reply_secret(salt, self._request.request_id)
        return salt, self._key.response_fernet(self._request, salt, reply_secret)


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
