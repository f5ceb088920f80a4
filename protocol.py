"""The messages of both sides: constants, limits, the request and the forms a job's input can take.

Owns every number and field name of SPEC.md sections 3, 4, 8 and 9 and the strict
parsing of them. Knows nothing of keys (keys.py), of the answer's frames
(frames.py), of engines or of networks.
"""

import json
import re
import struct
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from errors import Rejected, RequestError

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

ROUTES = {
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/responses": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/v1/embeddings": "POST",
    "/v1/score": "POST",
    "/score": "POST",
    "/v1/rerank": "POST",
    "/v2/rerank": "POST",
    "/rerank": "POST",
    "/classify": "POST",
    "/pooling": "POST",
    "/v1/audio/transcriptions": "POST",
    "/v1/audio/translations": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/version": "GET",
}
"""The paths of vLLM's server that a request may reach (SPEC section 8.3), each with its method.

Its application has others that are not for clients; which of these exist depends on the model.
"""

_LENGTH = struct.Struct(">I")

Seconds = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
"""Unix time within what every JSON reader holds exactly."""


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
    if end > len(inside) or len(inside) != padded_size(end):
        raise ValueError("wrong length")
    if not inside.endswith(bytes(len(inside) - end)):
        raise ValueError("padding that is not zero")
    return inside[_LENGTH.size : end]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request as it travels inside the envelope (SPEC section 3); times in Unix seconds."""

    request_id: str
    response_secret: str
    issued_at: Seconds
    expires_at: Seconds
    audience: str
    route: str
    method: Literal["POST", "GET"]
    body: msgspec.Raw

    def encode(self) -> bytes:
        """Return the request as JSON."""
        return msgspec.json.encode(self)

    @property
    def call(self) -> "Call":
        """What the request asks the engine to do."""
        body = bytes(self.body)
        return Call(self.route, self.method, b"" if body == b"null" else body)


class HpkeRequest(Request, frozen=True, forbid_unknown_fields=True):
    """A request as it travels in public-key mode (SPEC section 13.1)."""

    reply_key: str
    """The public half of the key that the answer is sealed to, in b64."""


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
    as_events: bool = False
    """Whether it came by the platform's OpenAI route, whose answer is server-sent events."""


@dataclass(frozen=True, slots=True)
class SimpleInput:
    """Job input of SPEC section 9; not yet opened."""

    encrypted_input: str


@dataclass(frozen=True, slots=True)
class PlaintextInput:
    """One of the official worker's three forms, served only with ALLOW_PLAINTEXT.

    `form` is `openai` (`openai_route`, `openai_input`), `route` (`route`, `body`, `method`)
    or `generate` (`prompt` or `messages`), whose call is a `generate` body. `stream` is
    what the caller asked for, false by default as with the official worker.
    """

    call: Call
    stream: bool
    form: Literal["openai", "route", "generate"]


JobInput = SealedInput | SimpleInput | PlaintextInput


def strict_json(data: bytes | str) -> Any:
    """Decode JSON as SPEC section 1 has it; ValueError, without quoting, for anything else.

    msgspec refuses NaN, Infinity, floats beyond range and lone surrogates by itself.
    """
    try:
        raw = data.encode() if isinstance(data, str) else data
        value = msgspec.json.decode(raw)
    except RecursionError:
        reason = f"JSON nested deeper than {MAX_DEPTH}"
    except UnicodeError:
        reason = "not valid JSON: not valid UTF-8"
    except msgspec.DecodeError as error:
        reason = f"not valid JSON: {error}"
    else:
        if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
            _check_depth(value)
        return value
    raise ValueError(reason)


def json_bytes(value: Any) -> bytes:
    """Return JSON of a decoded value; ValueError for what SPEC section 1 does not have."""
    try:
        data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        data = None
    except (TypeError, ValueError):
        raise ValueError("it holds a value that JSON does not have, such as NaN") from None
    if data is None:
        raise ValueError(f"JSON nested deeper than {MAX_DEPTH}")
    strict_json(data)
    return data.encode()


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for items in inside for child in items if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"JSON nested deeper than {MAX_DEPTH}")


def parse_request(data: bytes, kind: type[Request] = Request) -> Request:
    """Decode the JSON of a request; ValueError unless its members are those of its `kind`.

    `response_secret` and `reply_key` are only checked to be text: crypto.py decodes them.
    """
    strict_json(data)
    request = msgspec.json.decode(data, type=kind)
    request_id = request.request_id
    if len(request_id) != 2 * REQUEST_ID_BYTES or request_id.strip("0123456789abcdef"):
        raise ValueError("request_id is not 32 lower-case hex digits")
    body = bytes(request.body)
    if not body.startswith(b"{") and body != b"null":
        raise ValueError("body is neither an object nor null")
    if request.method == "GET" and body != b"null":
        raise ValueError("a GET request has a body")
    return request


_MEMBER = re.compile(r"(?:at `\$\.|unknown field `)(\w+)")


def parse_generate(body: bytes) -> GenerateBody:
    """Decode a `generate` body; RequestError naming the member that is wrong."""
    try:
        value = strict_json(body)
        if not isinstance(value, dict):
            raise ValueError("the body is not a JSON object")
        parsed = msgspec.convert(value, GenerateBody)
    except ValueError as error:
        member = _MEMBER.search(str(error))
        raise RequestError(f"generate: {error}", param=member and member[1]) from None
    if (parsed.messages is None) == (parsed.prompt is None):
        raise RequestError("generate: give either `messages` or `prompt`", param="messages")
    if parsed.messages is not None and not parsed.messages:
        raise RequestError("generate: `messages` is empty", param="messages")
    if parsed.prompt is not None and not parsed.prompt:
        raise RequestError("generate: `prompt` is empty", param="prompt")
    return parsed


_GENERATE_MEMBERS = frozenset(GenerateBody.__struct_fields__)
_FORM_MEMBERS = {
    "sealed": frozenset({"sealed"}),
    "encrypted_input": frozenset({"encrypted_input"}),
    "openai": frozenset({"openai_route", "openai_input"}),
    "route": frozenset({"route", "body", "method"}),
}


def parse_job_input(job_input: Any) -> JobInput:
    """Tell which form a job's input has (SPEC sections 1.2, 3 and 9, or one in plaintext).

    Rejected for a sealed or simple form that is not alone or not text; RequestError for
    plaintext that is none of the official worker's forms. Nothing is quoted.
    """
    if not isinstance(job_input, dict):
        raise RequestError("the job's input is not a JSON object")
    if "sealed" in job_input:
        return SealedInput(_only_text(job_input, "sealed"))
    if "encrypted_input" in job_input:
        return SimpleInput(_only_text(job_input, "encrypted_input"))
    by_route = job_input.get("openai_input")
    if isinstance(by_route, dict) and "sealed" in by_route:
        return _parse_sealed_route(job_input, by_route)
    try:
        if job_input.keys() & _FORM_MEMBERS["openai"]:
            return _parse_openai(job_input)
        if "route" in job_input:
            return _parse_route(job_input)
        if job_input.keys() & {"prompt", "messages"}:
            return _parse_generate_form(job_input)
    except ValueError as error:
        fault = str(error)
    else:
        fault = (
            "it has neither `sealed` nor `encrypted_input`, and none of `openai_input`, "
            "`route`, `messages` and `prompt`"
        )
    raise RequestError(f"the job's input cannot be used: {fault}")


def _only_text(job_input: dict[str, Any], member: str) -> str:
    value = job_input[member]
    if len(job_input) != 1 or not isinstance(value, str):
        raise Rejected
    return value


def _parse_sealed_route(job_input: dict[str, Any], given: dict[str, Any]) -> SealedInput:
    # The route is the platform's to add and says nothing: the real one is sealed.
    members = {**given}
    if members.pop("stream", None) is not True or not job_input.keys() <= _FORM_MEMBERS["openai"]:
        raise Rejected
    return SealedInput(_only_text(members, "sealed"), as_events=True)


def _only_members(job_input: dict[str, Any], form: str) -> None:
    allowed = _FORM_MEMBERS[form]
    if not job_input.keys() <= allowed:
        names = ", ".join(f"`{name}`" for name in sorted(allowed))
        raise ValueError(f"this form has no other members than {names}")


def _parse_openai(job_input: dict[str, Any]) -> PlaintextInput:
    """Form 1; an empty `openai_input` is how the platform hands on a GET."""
    _only_members(job_input, "openai")
    body = _object(job_input, "openai_input")
    route = job_input.get("openai_route")
    if route is None:
        if "messages" in body:
            route = "/v1/chat/completions"
        elif "prompt" in body:
            route = "/v1/completions"
        else:
            raise ValueError("without `openai_route`, `openai_input` has `messages` or `prompt`")
    return _call(route, "POST" if body else "GET", body, "openai")


def _parse_route(job_input: dict[str, Any]) -> PlaintextInput:
    """Form 2; without `method` it is POST where there is a body, else GET."""
    _only_members(job_input, "route")
    body = _object(job_input, "body")
    method = job_input.get("method")
    if method is None:
        method = "POST" if job_input.get("body") is not None else "GET"
    if not isinstance(method, str) or method.upper() not in ("GET", "POST"):
        raise ValueError("`method` is neither GET nor POST")
    if method.upper() == "GET" and body:
        raise ValueError("a GET has no `body`")
    return _call(job_input["route"], method.upper(), body, "route")


def _call(
    route: Any, method: str, body: dict[str, Any], form: Literal["openai", "route"]
) -> PlaintextInput:
    if not isinstance(route, str) or not route:
        raise ValueError("the route is not text")
    data = json_bytes(body) if method == "POST" else b""
    return PlaintextInput(Call(route, method, data), body.get("stream") is True, form)


def _object(job_input: dict[str, Any], member: str) -> dict[str, Any]:
    value = job_input.get(member)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"`{member}` is not an object")
    return value


def _parse_generate_form(job_input: dict[str, Any]) -> PlaintextInput:
    """Form 3; what is not a member of a `generate` body is taken for a sampling parameter.

    The engine refuses unknown ones, so nothing is accepted and then ignored.
    """
    apply_chat_template = job_input.get("apply_chat_template", False)
    if not isinstance(apply_chat_template, bool):
        raise ValueError("`apply_chat_template` is neither true nor false")
    body = {name: value for name, value in job_input.items() if name in _GENERATE_MEMBERS}
    params = dict(_object(job_input, "sampling_params"))
    for name in job_input.keys() - _GENERATE_MEMBERS - {"apply_chat_template"}:
        if name in params:
            raise ValueError("a sampling parameter is given twice")
        params[name] = job_input[name]
    if params:
        body["sampling_params"] = params
    if apply_chat_template and isinstance(body.get("prompt"), str):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    body.setdefault("stream", False)
    if not isinstance(body["stream"], bool):
        raise ValueError("`stream` is neither true nor false")
    return PlaintextInput(
        Call(GENERATE, "POST", json_bytes(body)), stream=body["stream"], form="generate"
    )
