"""Anthropic's SDK against the gateway; see harness.py."""

import asyncio
import json
from typing import Any

import anthropic
from harness import API_KEY, BASE_URL, MANY, MODEL, SCHEMA, Facts, main, prompt, said, scenario

ROOT_URL = BASE_URL.removesuffix("/v1")
CLIENT = anthropic.Anthropic(base_url=ROOT_URL, api_key=API_KEY)
TOOLS: Facts = {
    "tools": [{"name": "weather", "description": "The weather.", "input_schema": SCHEMA}],
    "tool_choice": {"type": "tool", "name": "weather"},
}


def asked(name: str, **options: Any) -> Facts:
    """Return the arguments of a message."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt(name)}],
        "max_tokens": 40,
        # The SDK has no argument for it any more.
        "extra_body": {"temperature": 0},
        **options,
    }


def structured(schema: Facts) -> Facts:
    """Return the argument that has an answer follow a schema."""
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


def reported(body: Facts, **options: Any) -> Facts:
    """Return the arguments as they are to travel."""
    rest = {name: value for name, value in body.items() if name != "extra_body"}
    return {**rest, **body["extra_body"], **options}


def facts_of(message: anthropic.types.Message) -> Facts:
    """Return what an answer holds."""
    return {
        "text": "".join(block.text for block in message.content if block.type == "text"),
        "tools": [
            [block.name, block.input] for block in message.content if block.type == "tool_use"
        ],
        "finish": message.stop_reason,
        "output_tokens": message.usage.output_tokens,
    }


def raised(error: anthropic.APIError) -> Facts:
    """Return what an error tells."""
    status = getattr(error, "status_code", None)
    return {"error": type(error).__name__, "status": status, "body": error.body}


@scenario
def message() -> Facts:
    body = asked("message")
    return {"asked": reported(body), **facts_of(CLIENT.messages.create(**body))}


@scenario
def system() -> Facts:
    body = asked("system", system="You are a sailor.")
    return {"asked": reported(body), **facts_of(CLIENT.messages.create(**body))}


@scenario
def message_streamed() -> Facts:
    body = asked("message_streamed")
    with CLIENT.messages.stream(**body) as stream:
        pieces = list(stream.text_stream)
        facts = facts_of(stream.get_final_message())
    assert "".join(pieces) == facts["text"]
    return {"asked": reported(body, stream=True), "chunks": len(pieces), **facts}


@scenario
def schema() -> Facts:
    body = asked("schema", max_tokens=150, **structured(SCHEMA))
    message = CLIENT.messages.create(**body)
    return {
        "asked": reported(body),
        "parsed": json.loads(facts_of(message)["text"]),
        **facts_of(message),
    }


@scenario
def tool() -> Facts:
    body = asked("tool", max_tokens=150, **TOOLS)
    return {"asked": reported(body), **facts_of(CLIENT.messages.create(**body))}


@scenario
def tool_streamed() -> Facts:
    body = asked("tool_streamed", max_tokens=150, **TOOLS)
    with CLIENT.messages.stream(**body) as stream:
        kinds = [event.type for event in stream]
        facts = facts_of(stream.get_final_message())
    return {"asked": reported(body, stream=True), "chunks": kinds.count("input_json"), **facts}


@scenario
def count_tokens() -> Facts:
    body = asked("count_tokens")
    del body["max_tokens"], body["extra_body"]
    return {"asked": body, "tokens": CLIENT.messages.count_tokens(**body).input_tokens}


def refused(
    kind: type[anthropic.APIError], body: Facts, client: anthropic.Anthropic = CLIENT
) -> Facts:
    """Return what the error tells with which a message ends."""
    try:
        client.messages.create(**body)
    except kind as error:
        return raised(error)
    return {"error": None}


@scenario
def unknown_model() -> Facts:
    return refused(anthropic.NotFoundError, asked("unknown_model", model="nobody"))


@scenario
def too_long() -> Facts:
    body = asked("too_long", messages=[{"role": "user", "content": prompt("too_long") * 400}])
    return refused(anthropic.BadRequestError, body)


@scenario
def wrong_key() -> Facts:
    client = anthropic.Anthropic(base_url=ROOT_URL, api_key="wrong")
    return refused(anthropic.AuthenticationError, asked("wrong_key"), client)


@scenario
def cancelled() -> Facts:
    with CLIENT.messages.stream(**asked("cancelled", max_tokens=1500)) as stream:
        read = [next(stream.text_stream) for _ in range(3)]
    return {"chunks": len(read)}


@scenario
async def many() -> Facts:
    async with anthropic.AsyncAnthropic(base_url=ROOT_URL, api_key=API_KEY) as client:

        async def one(number: int) -> str:
            only = structured({"enum": [said("many", number)]})
            async with client.messages.stream(**asked("many", max_tokens=300, **only)) as stream:
                return str(json.loads("".join([piece async for piece in stream.text_stream])))

        return {"texts": await asyncio.gather(*map(one, range(MANY)))}


@scenario
def broken() -> Facts:
    text = ""
    try:
        with CLIENT.messages.stream(**asked("broken", max_tokens=300)) as stream:
            for piece in stream.text_stream:
                text += piece
    except anthropic.APIError as error:
        return {"text": text, **raised(error)}
    return {"text": text, "error": None}


if __name__ == "__main__":
    main()
