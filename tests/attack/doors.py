"""Every door by which a prompt comes in: requests that carry a canary wherever one fits.

Most are valid; the others are refused, at every depth, by messages that quote what they refuse.
"""

from collections.abc import Iterator
from typing import Any

from tests.attack.canaries import Words
from tests.workers import SERVED

CHAT = "/v1/chat/completions"
Asked = tuple[str, dict[str, Any]]

_SHORT = {"max_tokens": 4}


def messages(word: Words, kind: str) -> list[dict[str, Any]]:
    """Return a conversation with a tool's call in it."""
    call = {"name": "look", "arguments": '{"at": "' + word(f"{kind} earlier argument") + '"}'}
    return [
        {"role": "system", "content": word(f"{kind} system")},
        {"role": "user", "content": "Look!"},
        {
            "role": "assistant",
            "content": "Looking.",
            "tool_calls": [{"id": "c1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": word(f"{kind} tool result")},
        {"role": "user", "content": word(f"{kind} prompt")},
    ]


def sampling(word: Words, kind: str) -> dict[str, Any]:
    """Return sampling parameters that cannot be met with elsewhere."""
    return {
        "max_tokens": 8,
        "seed": word.number(f"{kind} seed"),
        "temperature": float("0." + word.digits(f"{kind} temperature")),
        "stop": [word(f"{kind} stop")],
        "bad_words": [word(f"{kind} bad")],
    }


def saying(word: Words, kind: str) -> dict[str, Any]:
    """Return sampling parameters under which a word is all that can be answered."""
    return {"structured_outputs": {"choice": [word(f"{kind} answer")]}}


def tool(word: Words, kind: str) -> dict[str, Any]:
    """Return a tool that can be called with one argument only."""
    argument = word(f"{kind} argument")
    return {
        "type": "function",
        "function": {
            "name": "f" + word.name(f"{kind} tool"),
            "description": word(f"{kind} description"),
            "parameters": {
                "type": "object",
                "properties": {argument: {"enum": [word(f"{kind} argument value")]}},
                "required": [argument],
            },
        },
    }


def schema(word: Words, kind: str) -> dict[str, Any]:
    """Return what an answer must look like."""
    name = word(f"{kind} property")
    wanted = {
        "type": "object",
        "properties": {name: {"enum": [word(f"{kind} enum")]}},
        "required": [name],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": wanted}}


def answered(word: Words, kind: str) -> Iterator[Asked]:
    """Yield requests that are answered: by the native route, then by vLLM's."""
    said = messages(word, kind)
    yield "generate", {"messages": said, "sampling_params": saying(word, kind)}
    yield "generate", {"messages": said, "sampling_params": sampling(word, kind)}
    chat = {"model": SERVED, "messages": said, **_SHORT}
    yield CHAT, {**chat, "tools": [tool(word, kind)], "tool_choice": "required", "stream": True}
    yield CHAT, {**chat, "user": word(f"{kind} user"), "stop": [word(f"{kind} chat stop")]}
    yield "/v1/completions", {"model": SERVED, "prompt": word(f"{kind} completion"), **_SHORT}


def answered_too(word: Words, kind: str) -> Iterator[Asked]:
    """Yield more of them: other forms, and other routes."""
    said = messages(word, kind)
    yield "generate", {"messages": said, "sampling_params": saying(word, kind), "stream": False}
    yield "generate", {"prompt": word(f"{kind} raw"), "sampling_params": {**_SHORT, "logprobs": 3}}
    bounded = {"sampling_params": {"max_tokens": 60}}
    yield "generate", {"messages": said, "response_format": schema(word, kind), **bounded}
    called = {"tools": [tool(word, kind)], "tool_choice": "none"}
    yield "generate", {"messages": said, **called, "sampling_params": _SHORT}
    chat = {"model": SERVED, "messages": said, **_SHORT}
    yield CHAT, {**chat, "tools": [tool(word, kind)], "tool_choice": tool(word, kind)}
    yield CHAT, {**chat, "response_format": schema(word, kind), "stream": True}
    yield "/v1/responses", {"model": SERVED, "input": word(f"{kind} input"), "max_output_tokens": 4}
    yield "/v1/messages", {**chat, "messages": [{"role": "user", "content": word(f"{kind} note")}]}
    yield "/tokenize", {"model": SERVED, "prompt": word(f"{kind} tokenize")}


def refused(word: Words, kind: str) -> Iterator[Asked]:
    """Yield requests that are refused by the worker, by the engine and by vLLM's routes."""
    wrong = word(f"{kind} wrong")
    role = {"role": wrong, "content": wrong, wrong: wrong}
    yield "generate", {"messages": [role], "sampling_params": _SHORT}
    yield "generate", {"prompt": "x", "sampling_params": {wrong: wrong}}
    grammar = {**_SHORT, "structured_outputs": {"grammar": wrong}}
    yield "generate", {"prompt": "x", "sampling_params": grammar}
    yield "generate", {"prompt": f"{wrong} " * 1500}
    yield "generate", {"messages": [file(word, kind)], "sampling_params": _SHORT}
    yield CHAT, {"model": SERVED, "messages": [{"role": "user", "content": {wrong: wrong}}]}
    yield CHAT, {"model": SERVED, "messages": [file(word, kind)], **_SHORT}


def refused_too(word: Words, kind: str) -> Iterator[Asked]:
    """Yield more of them."""
    wrong = word(f"{kind} wrong")
    yield "generate", {"prompt": "x", wrong: wrong}
    yield "generate", {"prompt": "x", "model": wrong, "sampling_params": _SHORT}
    yield "generate", {"prompt": "x", "sampling_params": {"temperature": wrong}}
    for structured in (
        {"regex": f"({wrong}"},
        {"json": {"type": wrong, "$ref": f"#/{wrong}"}},
        {"json": wrong},
        {"choice": [5, {wrong: wrong}]},
        {wrong: wrong},
    ):
        params = {**_SHORT, "structured_outputs": structured}
        yield "generate", {"prompt": "x", "sampling_params": params}
    short = {"sampling_params": _SHORT}
    yield "generate", {"prompt": "x", "response_format": {"type": wrong}, **short}
    part = {"type": wrong, wrong: wrong}
    yield "generate", {"messages": [{"role": "user", "content": [part]}], **short}
    template = {"chat_template_kwargs": {"chat_template": wrong}, "sampling_params": _SHORT}
    yield "generate", {"messages": messages(word, kind), **template}
    chat = {"model": SERVED, "messages": messages(word, kind), **_SHORT}
    yield CHAT, {**chat, "model": wrong}
    yield CHAT, {**chat, "temperature": wrong}
    yield CHAT, {**chat, "tool_choice": wrong}
    image = {"type": "image_url", "image_url": {"url": f"file:///tmp/{wrong}.png"}}
    yield CHAT, {**chat, "messages": [{"role": "user", "content": [image]}]}
    yield "/v1/responses", {"model": SERVED, "input": [{"type": wrong}]}
    yield f"/v1/{word.name(f'{kind} route')}", {"prompt": "x"}


def file(word: Words, kind: str) -> dict[str, Any]:
    """Return a message with a file, which has a name."""
    name = word(f"{kind} file name") + ".pdf"
    data = f"data:application/pdf;base64,{word.name(f'{kind} file data')}"
    part = {"type": "file", "file": {"filename": name, "file_data": data}}
    return {"role": "user", "content": [part]}
