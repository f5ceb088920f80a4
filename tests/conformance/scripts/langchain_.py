"""LangChain's OpenAI integration against the gateway; see harness.py."""

import asyncio
from typing import Any, Literal

import openai
from harness import API_KEY, BASE_URL, MANY, MODEL, Facts, main, prompt, said, scenario
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    warm: bool


def weather(city: Literal["Paris", "Rome"], warm: bool) -> str:
    """Look up the weather of a city."""
    return "sunny"


def model(**options: Any) -> ChatOpenAI:
    """Return a chat model that is asked without chance."""
    given = {"temperature": 0, "max_tokens": 40, **options}
    return ChatOpenAI(base_url=BASE_URL, api_key=API_KEY, model=MODEL, **given)


@scenario
def invoke() -> Facts:
    message = model().invoke(prompt("invoke"))
    return {
        "text": message.content,
        "finish": message.response_metadata["finish_reason"],
        "usage": message.usage_metadata,
    }


@scenario
def conversation() -> Facts:
    turns = [("system", "You are a sailor."), ("human", prompt("conversation"))]
    return {"text": model().invoke(turns).content}


@scenario
def stream() -> Facts:
    chunks = list(model(stream_usage=True).stream(prompt("stream")))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return {"chunks": len(chunks), "text": whole.content, "usage": whole.usage_metadata}


@scenario
def structured_output() -> Facts:
    runnable = model(max_tokens=150).with_structured_output(Weather, method="json_schema")
    found = runnable.invoke(prompt("structured_output"))
    return {"parsed": found.model_dump()}


@scenario
def structured_output_by_tool() -> Facts:
    runnable = model(max_tokens=150).with_structured_output(Weather, method="function_calling")
    found = runnable.invoke(prompt("structured_output_by_tool"))
    return {"parsed": found.model_dump()}


@scenario
def tools() -> Facts:
    message = (
        model(max_tokens=150).bind_tools([weather], tool_choice="weather").invoke(prompt("tools"))
    )
    return {"tools": [[call["name"], call["args"]] for call in message.tool_calls]}


@scenario
def tools_streamed() -> Facts:
    bound = model(max_tokens=150).bind_tools([weather], tool_choice="weather")
    chunks = list(bound.stream(prompt("tools_streamed")))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    calls = [[call["name"], call["args"]] for call in whole.tool_calls]
    return {"chunks": len(chunks), "tools": calls}


@scenario
def responses() -> Facts:
    message = model(use_responses_api=True).invoke(prompt("responses"))
    return {"text": message.text}


@scenario
def unknown_model() -> Facts:
    try:
        ChatOpenAI(base_url=BASE_URL, api_key=API_KEY, model="nobody").invoke(
            prompt("unknown_model")
        )
    except openai.NotFoundError as error:
        return {"error": type(error).__name__, "message": error.message}
    return {"error": None}


@scenario
def cancelled() -> Facts:
    endless = model(max_tokens=1500, extra_body={"ignore_eos": True})
    chunks = endless.stream(prompt("cancelled"))
    read = [next(chunks) for _ in range(3)]
    chunks.close()
    return {"chunks": len(read)}


@scenario
async def many() -> Facts:
    async def one(number: int) -> str:
        only = {"structured_outputs": {"choice": [said("many", number)]}}
        speaker = model(max_tokens=150, extra_body=only)
        return "".join([chunk.content async for chunk in speaker.astream(prompt("many"))])

    return {"texts": await asyncio.gather(*map(one, range(MANY)))}


@scenario
def broken() -> Facts:
    text = ""
    try:
        for chunk in model(max_tokens=300).stream(prompt("broken")):
            text += chunk.content
    except openai.APIError as error:
        return {"text": text, "error": type(error).__name__, "message": error.message}
    return {"text": text, "error": None}


@scenario
def embeddings() -> Facts:
    inputs = [prompt("embeddings", "First."), prompt("embeddings", "Second.")]
    # It would count tokens with a vocabulary that it downloads.
    embedder = OpenAIEmbeddings(
        base_url=BASE_URL, api_key=API_KEY, model=MODEL, check_embedding_ctx_length=False
    )
    return {
        "asked": {"model": MODEL, "input": inputs},
        "floats": embedder.embed_documents(inputs),
    }


if __name__ == "__main__":
    main()
