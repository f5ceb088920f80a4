"""The `generate` route's parameters and details (SPEC section 8.1) in vLLM's terms.

Owns the checking of sampling parameters and the form of log probabilities.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from errors import RequestError
from frames import AnswerEvent, Event
from protocol import GenerateBody


def choice_details(choice: Any, tokenizer: Any) -> list[AnswerEvent]:
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
    "trace_decode_token_ids",
    "prompt_logprob_token_ids",
}


def sampling_params(body: GenerateBody, defaults: Mapping[str, Any]) -> SamplingParams:
    """Return the request's checked SamplingParams; RequestError names a parameter that is wrong."""
    known = {
        name
        for name in SamplingParams.__struct_fields__
        if not name.startswith("_") and name not in _INTERNAL_PARAMS
    }
    given = dict(body.sampling_params)
    structured = given.pop("structured_outputs", None)
    for name in given:
        if name not in known:
            raise RequestError(f"unknown sampling parameter {name!r}", param=name)
    if body.response_format is not None:
        if structured is not None:
            raise RequestError("give either `response_format` or `structured_outputs`")
        structured = _structured_outputs(body.response_format)
    # What the model's authors recommend applies unless the request says otherwise; the
    # length does not, since an answer may fill the context (SPEC section 8.1).
    merged = {"max_tokens": None, **defaults, **given}
    try:
        params = msgspec.convert(merged, SamplingParams)
        if structured is not None:
            params.structured_outputs = StructuredOutputsParams(**structured)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        param = path.rstrip("`") or None
        raise RequestError(f"sampling_params: {param or 'value'}: {message}", param=param) from None
    except TypeError:
        raise RequestError(
            "structured_outputs: unknown member", param="structured_outputs"
        ) from None
    params.output_kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return params


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
