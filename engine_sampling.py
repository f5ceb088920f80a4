"""The `generate` route's parameters and details (SPEC section 8.1) in vLLM's terms.

Owns the checking of sampling parameters and the form of log probabilities.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import msgspec
import pydantic
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

from errors import RequestError
from frames import AnswerEvent, Event
from protocol import GenerateBody


def choice_details(choice: Any, tokenizer: Any) -> list[AnswerEvent]:
    """Return what is told of a choice beside its text, as at most one event (SPEC section 8.1)."""
    detail: dict[str, Any] = {}
    if choice.logprobs:
        detail["logprobs"] = [
            _logprob(token_id, position, tokenizer)
            for token_id, position in zip(choice.token_ids, choice.logprobs, strict=False)
        ]
    if choice.finish_reason is not None:
        detail["finish_reason"] = choice.finish_reason
        detail["stop_reason"] = choice.stop_reason
    return [Event({"index": choice.index, **detail})] if detail else []


def _logprob(token_id: int, position: Mapping[int, Any], tokenizer: Any) -> dict[str, Any]:
    def entry(token_id: int) -> dict[str, Any]:
        found = position[token_id]
        token = found.decoded_token
        if token is None and tokenizer is not None:
            token = tokenizer.decode([token_id])
        # JSON has no infinity; vLLM's own routes write -9999.0 in its place.
        return {"token": token, "token_id": token_id, "logprob": max(found.logprob, -9999.0)}

    ranked = sorted(position, key=lambda other: position[other].rank or 0)
    return {**entry(token_id), "top": [entry(other) for other in ranked]}


def prompt_logprobs(output: Any) -> list[dict[str, float] | None]:
    """Return for each token of the prompt its candidates, by id; None where vLLM has none."""
    return [
        None
        if position is None
        else {str(token): max(value.logprob, -9999.0) for token, value in position.items()}
        for position in output.prompt_logprobs
    ]


# Fields of SamplingParams that are vLLM's or the worker's own business.
_INTERNAL_PARAMS = {
    "output_kind",
    "skip_clone",
    "output_text_buffer_length",
    "structured_outputs",
    "stream_interval",
    "detokenize",
    "extra_args",
    "watermarking",
    "flat_logprobs",
    "skip_reading_prefix_cache",
    "routed_experts_prompt_start",
    "prompt_logprob_start",
    "trace_decode_token_ids",
    "prompt_logprob_token_ids",
}


_PUBLIC_PARAMS = frozenset(
    name
    for name in SamplingParams.__struct_fields__
    if not name.startswith("_") and name not in _INTERNAL_PARAMS
)

_INT64 = range(-(2**63), 2**63)
"""What the engine's processes can tell each other; larger numbers would be lost on the way."""


def sampling_params(body: GenerateBody, defaults: Mapping[str, Any]) -> SamplingParams:
    """Return the request's checked SamplingParams; RequestError names a parameter that is wrong."""
    given = dict(body.sampling_params)
    structured = given.pop("structured_outputs", None)
    for name, value in given.items():
        if name not in _PUBLIC_PARAMS:
            raise RequestError(f"unknown sampling parameter {name!r}", param=name)
        if any(number not in _INT64 for number in _integers(value)):
            raise RequestError(f"sampling_params: {name}: number too large", param=name)
    if body.response_format is not None:
        if structured is not None:
            raise RequestError("give either `response_format` or `structured_outputs`")
        structured = _structured_outputs(body.response_format)
    _only_known(
        "repetition_detection", given.get("repetition_detection"), RepetitionDetectionParams
    )
    # What the model's authors recommend applies unless the request says otherwise; the
    # length does not, since an answer may fill the context (SPEC section 8.1).
    merged = {"max_tokens": None, **defaults, **given}
    try:
        params = msgspec.convert(merged, SamplingParams, str_keys=True)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        param = match[1] if (match := _PARAM_IN_PATH.search(path)) else None
        raise RequestError(f"sampling_params: {param or 'value'}: {message}", param=param) from None
    if structured is not None:
        params.structured_outputs = _constraint(structured)
    params.output_kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return params


_PARAM_IN_PATH = re.compile(r"\$\.(\w+)")


def parameter_of(error: Exception) -> str | None:
    """Return the sampling parameter that an exception of vLLM is about.

    Not all of them carry it; the messages of the others begin with it.
    """
    named = getattr(error, "parameter", None)
    if named is None and error.args:
        first = str(error.args[0]).partition(" ")[0]
        named = first if first in _PUBLIC_PARAMS else None
    return named


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)


def _only_known(param: str, value: Any, kind: Any) -> None:
    """Refuse members that the dataclass `kind` would ignore."""
    if isinstance(value, dict):
        known = {entry.name for entry in fields(kind) if not entry.name.startswith("_")}
        for name in value.keys() - known:
            raise RequestError(f"{param}: unknown member {name!r}", param=param)


def _constraint(structured: Any) -> StructuredOutputsParams:
    param = "structured_outputs"
    if not isinstance(structured, dict):
        raise RequestError(f"{param}: expected an object", param=param)
    _only_known(param, structured, StructuredOutputsParams)
    try:
        return StructuredOutputsParams(**structured)
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise RequestError(f"{param}: {where}: {fault['msg']}", param=param) from None
    except (VLLMValidationError, ValueError):
        raise RequestError(
            f"{param}: give exactly one kind of constraint, such as `json`, `regex` or `choice`",
            param=param,
        ) from None


def _structured_outputs(response_format: Mapping[str, Any]) -> dict[str, Any] | None:
    match response_format:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"json_object": True}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json": schema}
    raise RequestError(
        "response_format: expected `text`, `json_object`, or `json_schema` with its schema",
        param="response_format",
    )
