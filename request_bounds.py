"""How much one request may ask for, and the refusal of what asks for more, before any work.

Owns which member of which route's body multiplies the work. What is counted is what the engine
gets: sequences to generate, and texts to embed, classify, score or rank. Reads bodies as far as
that goes and leaves the rest to vLLM. Knows nothing of vLLM, of keys and of running requests.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from errors import RequestError
from protocol import GENERATE, Call

DEFAULT_MAX_CHOICES = 128
"""What OpenAI's own API allows as `n`."""

_CHOICES = frozenset({"/v1/completions", "/v1/chat/completions"})

# A list of these is one text for each of its elements, whatever they are, ...
_TEXTS = ("queries", "documents", "items", "text_1", "text_2", "data_1", "data_2")
_INPUTS: Mapping[str, tuple[str, ...]] = {
    # ... but of numbers, which are one text's tokens, and of messages, which are one conversation.
    "/v1/embeddings": ("input", "messages"),
    "/pooling": ("input", "messages", "data"),
    "/classify": ("input", "messages"),
    "/v1/score": _TEXTS,
    "/score": _TEXTS,
    "/v1/rerank": _TEXTS,
    "/v2/rerank": _TEXTS,
    "/rerank": _TEXTS,
}

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_elements = msgspec.json.Decoder(list[msgspec.Raw]).decode


def default_max_choices(max_num_seqs: int) -> int:
    """Return how many sequences one request may have: half of the engine's seats at most."""
    return max(1, min(DEFAULT_MAX_CHOICES, max_num_seqs // 2))


@dataclass(frozen=True)
class Bounds:
    """The limits on one request; `check` refuses what exceeds one."""

    max_request_bytes: int
    max_choices: int
    max_inputs: int

    def check(self, call: Call) -> None:
        """Raise RequestError, with both numbers, for a call that asks for too much."""
        size = len(call.body)
        if size > self.max_request_bytes:
            raise RequestError(
                f"the request's body has {size} bytes, and this worker takes at most "
                f"{self.max_request_bytes} (MAX_REQUEST_BYTES)",
                status=413,
                type="RequestTooLargeError",
                code="request_too_large",
            )
        # What is no JSON vLLM refuses, in its own words.
        with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
            self._check_body(call.route, _members(call.body) if call.body else {})

    def _check_body(self, route: str, members: Mapping[str, msgspec.Raw]) -> None:
        if route == GENERATE:
            self._check_choices(_object(members.get("sampling_params")), 1)
        elif route in _CHOICES:
            prompts = _count(members.get("prompt"), token_lists=True)
            embeds = _count(members.get("prompt_embeds"), token_lists=True)
            self._check_choices(members, max(1, prompts + embeds))
        for name in _INPUTS.get(route, ()):
            count = _count(members.get(name), token_lists=name not in _TEXTS)
            if count > self.max_inputs:
                limit = f"{self.max_inputs} (MAX_INPUTS)"
                raise _too_many(f"`{name}` has {count} texts", limit, name)

    def _check_choices(self, members: Mapping[str, msgspec.Raw], prompts: int) -> None:
        asked = {name: _number(members.get(name)) for name in ("n", "best_of")}
        name = max(asked, key=lambda name: asked[name])
        each = max(1, asked[name])
        if each * prompts <= self.max_choices:
            return
        limit = f"{self.max_choices} choices in one request (MAX_CHOICES)"
        if prompts == 1:
            raise _too_many(f"`{name}` is {each}", limit, name)
        raise _too_many(
            f"`prompt` has {prompts} prompts of {each}, which are {each * prompts} choices",
            limit,
            "prompt",
        )


def _too_many(fault: str, limit: str, param: str) -> RequestError:
    return RequestError(
        f"{fault}, and this worker takes at most {limit}: split it into several requests",
        param=param,
    )


def _object(value: msgspec.Raw | None) -> Mapping[str, msgspec.Raw]:
    return {} if value is None else _members(value)


def _count(value: msgspec.Raw | None, *, token_lists: bool) -> int:
    """Return how many texts a member is; lists of numbers or objects are one if `token_lists`."""
    data = bytes(value or b"").lstrip()
    if data.startswith(b"{"):  # as scoring has it: one object whose content is a list
        content = _object(msgspec.Raw(data)).get("content")
        return max(1, _count(content, token_lists=False))
    if not data.startswith(b"["):
        return int(bool(data) and data != b"null")
    if token_lists and data[1:].lstrip()[:1] not in (b'"', b"["):
        return 1
    return len(_elements(data))


def _number(value: msgspec.Raw | None) -> int:
    """Return a number as vLLM would take it, also one that stands in a text; 0 where it is none."""
    if value is None:
        return 0
    given: Any = msgspec.json.decode(value)
    try:
        if isinstance(given, str):
            given = float(given)
        return int(given) if isinstance(given, int | float) else 0
    except (ValueError, OverflowError):
        return 0
