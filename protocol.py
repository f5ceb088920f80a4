"""The messages of both sides: constants, limits, the request and the forms a job's input can take.

Owns every number and field name of SPEC.md sections 3, 4, 8 and 9 and the strict
parsing of them. Knows nothing of keys (crypto.py), of the answer's frames
(frames.py), of engines or of networks.
"""

import struct
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from errors import RequestError

VERSION = "1"

CELL_BYTES = 1024
"""Smallest padded size of a request and of a chunk (SPEC section 3)."""

STEP_BYTES = 1024 * 1024
"""Above this size padding goes to the next multiple of it."""

MAX_REQUEST_BYTES = 15 * 1024 * 1024
"""Longest sealed request, in characters, that a worker looks at."""

MAX_CHUNK_BYTES = 512 * 1024
"""Largest inside of one chunk; sealed it stays below the platform's 1 MB per chunk."""

MAX_DEPTH = 100
"""Deepest nesting of arrays and objects in any JSON that is accepted."""

CLOCK_SKEW_S = 60
"""By how much the clocks of client and worker may differ (SPEC section 4)."""

MAX_TTL_S = 24 * 60 * 60
"""Longest life of a request that a worker accepts unless told otherwise (SPEC section 4)."""

REQUEST_ID_BYTES = 16
RESPONSE_SECRET_BYTES = 32
SALT_BYTES = 16

GENERATE = "generate"
WORKER = "worker"

_LENGTH = struct.Struct(">I")


def padded_size(size: int) -> int:
    """Return the padded size in bytes of `size` bytes (SPEC section 3)."""
    if size > STEP_BYTES:
        return -(-size // STEP_BYTES) * STEP_BYTES
    return max(CELL_BYTES, 1 << (size - 1).bit_length())


def pad(prefix: bytes, content: bytes) -> bytes:
    """Return `prefix | content | zeros` of the padded size."""
    return (prefix + content).ljust(padded_size(len(prefix) + len(content)), b"\0")


def pad_request(content: bytes) -> bytes:
    """Return a request's inside: uint32 length, JSON, zeros (SPEC section 3)."""
    return pad(_LENGTH.pack(len(content)), content)


def unpad_request(inside: bytes) -> bytes:
    """Return the JSON of a request's inside; ValueError unless its form is SPEC section 3's."""
    if len(inside) < _LENGTH.size:
        raise ValueError("shorter than its header")
    (length,) = _LENGTH.unpack_from(inside)
    end = _LENGTH.size + length
    if end > len(inside) or len(inside) != padded_size(end) or inside[end:].strip(b"\0"):
        raise ValueError("wrong length or padding")
    return inside[_LENGTH.size : end]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request as it travels inside the envelope (SPEC section 3); times in Unix seconds."""

    request_id: str
    response_secret: str
    issued_at: int
    expires_at: int
    audience: str
    route: str
    method: Literal["POST", "GET"]
    body: msgspec.Raw

    def encode(self) -> bytes:
        """Return the request as JSON."""
        return msgspec.json.encode(self)


class GenerateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The body of the `generate` route (SPEC section 8.1)."""

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    sampling_params: dict[str, Any] = {}
    stream: bool = True
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """What the engine is asked to do, free of how it arrived."""

    route: str
    method: str
    body: bytes
    """JSON, or empty with GET."""


@dataclass(frozen=True, slots=True)
class SealedInput:
    """Job input of SPEC section 3; not yet opened."""

    sealed: str


@dataclass(frozen=True, slots=True)
class SimpleInput:
    """Job input of SPEC section 9; not yet opened."""

    encrypted_input: str


@dataclass(frozen=True, slots=True)
class PlaintextInput:
    """One of the official worker's three forms, served only with ALLOW_PLAINTEXT."""

    call: Call
    stream: bool


JobInput = SealedInput | SimpleInput | PlaintextInput


def strict_json(data: bytes | str) -> Any:
    """Decode JSON as SPEC section 1 has it; ValueError, without quoting, for anything else.

    msgspec refuses NaN, Infinity, floats beyond range and lone surrogates by itself.
    """
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise ValueError(f"JSON nested deeper than {MAX_DEPTH}") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    raw = data.encode() if isinstance(data, str) else data
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for items in inside for child in items if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"JSON nested deeper than {MAX_DEPTH}")


def parse_request(data: bytes) -> Request:
    """Decode the JSON of a request; ValueError unless its members are SPEC section 3's."""
    strict_json(data)
    request = msgspec.json.decode(data, type=Request)
    request_id = request.request_id
    if len(request_id) != 2 * REQUEST_ID_BYTES or request_id.strip("0123456789abcdef"):
        raise ValueError("request_id is not 32 lower-case hex digits")
    if request.method == "GET" and bytes(request.body) != b"null":
        raise ValueError("a GET request has a body")
    if not bytes(request.body).startswith((b"{", b"null")):
        raise ValueError("body is neither an object nor null")
    return request


def parse_generate(body: bytes) -> GenerateBody:
    """Decode a `generate` body; RequestError naming the member that is wrong."""
    try:
        value = strict_json(body)
        if not isinstance(value, dict):
            raise ValueError("the body is not a JSON object")
        parsed = msgspec.convert(value, GenerateBody)
    except (ValueError, msgspec.ValidationError) as error:
        raise RequestError(f"generate: {error}") from None
    if (parsed.messages is None) == (parsed.prompt is None):
        raise RequestError("generate: give either `messages` or `prompt`", param="messages")
    if parsed.messages is not None and not parsed.messages:
        raise RequestError("generate: `messages` is empty", param="messages")
    if parsed.prompt is not None and not parsed.prompt:
        raise RequestError("generate: `prompt` is empty", param="prompt")
    return parsed
