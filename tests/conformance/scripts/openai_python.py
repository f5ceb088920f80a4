"""openai-python against the gateway; see harness.py."""

import asyncio
from collections.abc import Iterable
from typing import Any, Literal

import openai
from harness import (
    API_KEY,
    BASE_URL,
    MANY,
    MODEL,
    SCHEMA,
    Facts,
    asked,
    main,
    prompt,
    said,
    scenario,
)
from pydantic import BaseModel

CLIENT = openai.OpenAI(base_url=BASE_URL, api_key=API_KEY)
WEATHER = {"name": "weather", "description": "The weather of a city.", "parameters": SCHEMA}
TOOLS: Facts = {
    "tools": [{"type": "function", "function": WEATHER}],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
}


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    warm: bool


def facts_of(completion: Any) -> Facts:
    """Return what a whole answer holds."""
    choices = [
        {
            "text": choice.message.content or "",
            "tools": [
                [call.function.name, call.function.arguments]
                for call in choice.message.tool_calls or []
            ],
            "finish": choice.finish_reason,
        }
        for choice in completion.choices
    ]
    return {"choices": choices, "usage": completion.usage.model_dump(exclude_none=True)}


def gathered(chunks: Iterable[Any]) -> Facts:
    """Return what a streamed answer holds, in the same form."""
    choices: dict[int, Facts] = {}
    facts: Facts = {"chunks": 0}
    for chunk in chunks:
        facts["chunks"] += 1
        if chunk.usage:
            facts["usage"] = chunk.usage.model_dump(exclude_none=True)
            facts["choices_beside_usage"] = len(chunk.choices)
        for piece in chunk.choices:
            choice = choices.setdefault(piece.index, {"text": "", "tools": [], "finish": None})
            choice["text"] += piece.delta.content or ""
            choice["finish"] = piece.finish_reason or choice["finish"]
            for call in piece.delta.tool_calls or []:
                if call.function.name:
                    assert call.index == len(choice["tools"]), call
                    assert call.id, call
                    choice["tools"].append([call.function.name, ""])
                choice["tools"][call.index][1] += call.function.arguments or ""
    return facts | {"choices": [choices[index] for index in sorted(choices)]}


def raised(error: openai.APIError) -> Facts:
    """Return what an error tells."""
    return {
        "error": type(error).__name__,
        "status": getattr(error, "status_code", None),
        "message": error.message,
        "code": error.code,
        "type": error.type,
        "body": error.body,
    }


@scenario
def models() -> Facts:
    return {"models": [model.id for model in CLIENT.models.list()]}


@scenario
def chat() -> Facts:
    body = asked("chat")
    completion = CLIENT.chat.completions.create(**body)
    return {
        "asked": body,
        "request_id": completion._request_id,
        "model": completion.model,
        **facts_of(completion),
    }


@scenario
def chat_streamed() -> Facts:
    body = asked("chat_streamed", stream=True)
    return {"asked": body, **gathered(CLIENT.chat.completions.create(**body))}


@scenario
def usage_chunk() -> Facts:
    body = asked("usage_chunk", stream=True, stream_options={"include_usage": True})
    return {"asked": body, **gathered(CLIENT.chat.completions.create(**body))}


@scenario
def choices() -> Facts:
    body = asked("choices", n=2, seed=7, temperature=1)
    return {"asked": body, **facts_of(CLIENT.chat.completions.create(**body))}


@scenario
def choices_streamed() -> Facts:
    body = asked("choices_streamed", n=2, seed=7, temperature=1, stream=True)
    return {"asked": body, **gathered(CLIENT.chat.completions.create(**body))}


@scenario
def logprobs() -> Facts:
    body = asked("logprobs", logprobs=True, top_logprobs=2)
    completion = CLIENT.chat.completions.create(**body)
    entries = completion.choices[0].logprobs.content
    return {
        "asked": body,
        "tokens": [entry.token for entry in entries],
        "tops": [len(entry.top_logprobs) for entry in entries],
        "greedy": all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries),
        **facts_of(completion),
    }


@scenario
def logprobs_streamed() -> Facts:
    body = asked("logprobs_streamed", logprobs=True, top_logprobs=2, stream=True)
    chunks = list(CLIENT.chat.completions.create(**body))
    found = [c.choices[0].logprobs.content for c in chunks if c.choices and c.choices[0].logprobs]
    entries = [entry for content in found for entry in content]
    return {
        "asked": body,
        "tokens": [entry.token for entry in entries],
        "tops": [len(entry.top_logprobs) for entry in entries],
        **gathered(chunks),
    }


@scenario
def stop() -> Facts:
    body = asked("stop", stop=[" three"])
    only = {"structured_outputs": {"choice": ["one two three four"]}}
    completion = CLIENT.chat.completions.create(**body, extra_body=only)
    return {"asked": body | only, **facts_of(completion)}


@scenario
def schema() -> Facts:
    body = asked("schema", max_tokens=150)
    completion = CLIENT.chat.completions.parse(**body, response_format=Weather)
    parsed = completion.choices[0].message.parsed
    return {"asked": body, "parsed": parsed and parsed.model_dump(), **facts_of(completion)}


@scenario
def tool() -> Facts:
    body = asked("tool", max_tokens=150, **TOOLS)
    return {"asked": body, **facts_of(CLIENT.chat.completions.create(**body))}


@scenario
def tool_streamed() -> Facts:
    body = asked("tool_streamed", max_tokens=150, stream=True, **TOOLS)
    return {"asked": body, **gathered(CLIENT.chat.completions.create(**body))}


@scenario
def completion() -> Facts:
    body = {
        "model": MODEL,
        "prompt": prompt("completion", "The sea is a"),
        "temperature": 0,
        "max_tokens": 40,
    }
    answer = CLIENT.completions.create(**body)
    return {
        "asked": body,
        "choices": [{"text": c.text, "finish": c.finish_reason} for c in answer.choices],
    }


@scenario
def completion_streamed() -> Facts:
    body = {
        "model": MODEL,
        "prompt": prompt("completion_streamed", "The sea is a"),
        "temperature": 0,
        "max_tokens": 40,
        "stream": True,
    }
    pieces = [chunk.choices[0] for chunk in CLIENT.completions.create(**body) if chunk.choices]
    text = "".join(piece.text for piece in pieces)
    return {
        "asked": body,
        "chunks": len(pieces),
        "choices": [{"text": text, "finish": pieces[-1].finish_reason}],
    }


def asked_responses(name: str, **options: Any) -> Facts:
    """Return the arguments of a response."""
    return {
        "model": MODEL,
        "input": prompt(name),
        "temperature": 0,
        "max_output_tokens": 40,
        **options,
    }


@scenario
def responses() -> Facts:
    body = asked_responses("responses")
    response = CLIENT.responses.create(**body)
    return {"asked": body, "text": response.output_text, "status": response.status}


@scenario
def responses_streamed() -> Facts:
    body = asked_responses("responses_streamed", stream=True)
    events = list(CLIENT.responses.create(**body))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    return {
        "asked": body,
        "kinds": [event.type for event in events],
        "chunks": len(deltas),
        "text": "".join(deltas),
        "status": events[-1].response.status,
    }


def refused(kind: type[openai.APIError], body: Facts, client: openai.OpenAI = CLIENT) -> Facts:
    """Return what the error tells with which a chat completion ends."""
    try:
        client.chat.completions.create(**body)
    except kind as error:
        return raised(error)
    return {"error": None}


@scenario
def unknown_model() -> Facts:
    return refused(openai.NotFoundError, asked("unknown_model", model="nobody"))


@scenario
def unknown_model_streamed() -> Facts:
    body = asked("unknown_model_streamed", model="nobody", stream=True)
    return refused(openai.NotFoundError, body)


@scenario
def too_long() -> Facts:
    body = asked("too_long", messages=[{"role": "user", "content": prompt("too_long") * 400}])
    return refused(openai.BadRequestError, body)


@scenario
def wrong_key() -> Facts:
    client = openai.OpenAI(base_url=BASE_URL, api_key="wrong")
    return refused(openai.AuthenticationError, asked("wrong_key"), client)


@scenario
def cancelled() -> Facts:
    body = asked("cancelled", max_tokens=1500, stream=True)
    with CLIENT.chat.completions.create(**body, extra_body={"ignore_eos": True}) as stream:
        read = [next(stream) for _ in range(3)]
    return {"chunks": len(read)}


@scenario
async def many() -> Facts:
    async with openai.AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY) as client:

        async def one(number: int) -> str:
            stream = await client.chat.completions.create(
                **asked("many", max_tokens=150, stream=True),
                extra_body={"structured_outputs": {"choice": [said("many", number)]}},
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

        return {"texts": await asyncio.gather(*map(one, range(MANY)))}


@scenario
def broken() -> Facts:
    text = ""
    try:
        for chunk in CLIENT.chat.completions.create(**asked("broken", max_tokens=300, stream=True)):
            text += chunk.choices[0].delta.content or ""
    except openai.APIError as error:
        return {"text": text, **raised(error)}
    return {"text": text, "error": None}


@scenario
def broken_completion() -> Facts:
    text = ""
    body = {"model": MODEL, "prompt": prompt("broken_completion", "The sea is a"), "temperature": 0}
    try:
        for chunk in CLIENT.completions.create(**body, max_tokens=300, stream=True):
            text += chunk.choices[0].text
    except openai.APIError as error:
        return {"text": text, **raised(error)}
    return {"text": text, "error": None}


@scenario
def broken_response() -> Facts:
    text = ""
    body = asked_responses("broken_response", max_output_tokens=300, stream=True)
    try:
        for event in CLIENT.responses.create(**body):
            text += event.delta if event.type == "response.output_text.delta" else ""
            if event.type == "error":
                return {"text": text, "error": "event", "message": event.message}
    except openai.APIError as error:
        return {"text": text, **raised(error)}
    return {"text": text, "error": None}


@scenario
def embeddings() -> Facts:
    inputs = [prompt("embeddings", "First."), prompt("embeddings", "Second.")]
    # Without a format the SDK asks for base64 and decodes it.
    packed = CLIENT.embeddings.create(model=MODEL, input=inputs)
    floats = CLIENT.embeddings.create(model=MODEL, input=inputs, encoding_format="float")
    return {
        "asked": {"model": MODEL, "input": inputs},
        "packed": [entry.embedding for entry in packed.data],
        "floats": [entry.embedding for entry in floats.data],
    }


if __name__ == "__main__":
    main()
