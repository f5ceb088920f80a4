"""vLLM's own server, what it is asked, and what of its answers is the same every time.

A worker at parity answers the same requests with the same bodies and events.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from tests.wait import until

CHAT = "/v1/chat/completions"


@contextlib.contextmanager
def vllms_server(model: Path, served: str, folder: Path, *options: str) -> Iterator[httpx2.Client]:
    """Run vLLM's own server on a free port and yield a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += [f"--model={model}", f"--served-model-name={served}", "--host=127.0.0.1"]
    command += [f"--port={port}", "--enforce-eager", "--disable-log-stats", *options]
    environ = {name: os.environ[name] for name in os.environ if not name.startswith("VLLM_LOGGING")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
    client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def healthy() -> bool:
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        try:
            return client.get("/health").status_code == 200
        except httpx2.TransportError:
            return False

    try:
        until(healthy, 300, "vLLM's own server to start")
        yield client
    finally:
        client.close()
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


CHANGING = {
    *("id", "created", "created_at", "completed_at", "item_id", "call_id", "system_fingerprint"),
    *("sequence_number", "request_id", "tool_call_id", "timestamp"),
}


def constant(value: Any) -> Any:
    """Return the value without what differs from one request to the next."""
    if isinstance(value, dict):
        return {name: constant(item) for name, item in value.items() if name not in CHANGING}
    if isinstance(value, list):
        return [constant(item) for item in value]
    if isinstance(value, str):
        value = re.sub(r"\[\d\d:\d\d:\d\d\] ", "", value)  # xgrammar tells the time
        return re.sub(r"\b(chatcmpl|cmpl|resp|msg|modelperm|fc|call|rs|toolu)[-_]\w+", r"\1", value)
    return value


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


PARITY: dict[str, tuple[str, dict[str, Any] | None]] = {
    "models": ("/v1/models", None),
    "version": ("/version", None),
    "tokenize": (
        "/tokenize",
        {"prompt": "Hello there", "return_token_strs": True},
    ),
    "tokenize messages": ("/tokenize", {"messages": user("Hello")}),
    "detokenize": ("/detokenize", {"tokens": [100, 200, 300]}),
    "chat": (CHAT, {"messages": user("Hello"), "max_tokens": 8}),
    "chat, logprobs": (
        CHAT,
        {"messages": user("Hello"), "max_tokens": 4, "logprobs": True, "top_logprobs": 3},
    ),
    "chat, prompt logprobs": (
        CHAT,
        {"messages": user("Hello"), "max_tokens": 2, "prompt_logprobs": 1},
    ),
    "chat, choices": (
        CHAT,
        {"messages": user("Hello"), "max_tokens": 4, "n": 3, "seed": 5, "temperature": 1},
    ),
    "chat, schema": (
        CHAT,
        {
            "messages": user("Hello"),
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "x",
                    "schema": {"type": "object", "properties": {"a": {"enum": ["b", "c"]}}},
                },
            },
            "max_tokens": 40,
        },
    ),
    "chat, tool": (
        CHAT,
        {
            "messages": user("Hello"),
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "max_tokens": 60,
        },
    ),
    "completions": ("/v1/completions", {"prompt": "Hello", "max_tokens": 8}),
    "completions, several": (
        "/v1/completions",
        {"prompt": ["Hello", "Once"], "max_tokens": 4, "logprobs": 2, "echo": True},
    ),
    "responses": ("/v1/responses", {"input": "Hello", "max_output_tokens": 8}),
    "messages": ("/v1/messages", {"messages": user("Hello"), "max_tokens": 8}),
    "count tokens": ("/v1/messages/count_tokens", {"messages": user("Hello")}),
    "unknown model": (CHAT, {"model": "nope", "messages": user("Hello")}),
    "too long": (CHAT, {"messages": user("x " * 4000)}),
    "out of range": (CHAT, {"messages": user("x"), "temperature": 9}),
    "wrong type": (CHAT, {"messages": "x"}),
    "wrong role": (CHAT, {"messages": [{"role": "nobody", "content": "x"}], "max_tokens": 2}),
    "huge number": (CHAT, {"messages": user("x"), "max_tokens": 10**30}),
    "no messages": (CHAT, {}),
    "anthropic error": ("/v1/messages", {"messages": user("Hello")}),
    "responses error": ("/v1/responses", {"input": 5}),
    "schema error": (
        CHAT,
        {"messages": user("x"), "structured_outputs": {"json": {"type": "nope"}}},
    ),
}


STREAMED = [
    *("chat", "chat, logprobs", "chat, choices", "chat, schema", "chat, tool"),
    *("completions", "responses", "messages", "unknown model", "too long", "huge number"),
]
"""Those that are streamed too."""


def asked(name: str, model: str) -> tuple[str, Any]:
    """Return the path and the body of a request of PARITY, for a model."""
    path, body = PARITY[name]
    if isinstance(body, dict):
        body = {"model": model, **({} if "tokens" in body else {"temperature": 0}), **body}
    return path, body


def asked_streamed(name: str, model: str) -> tuple[str, Any]:
    """Return the same, streamed and with usage."""
    path, body = asked(name, model)
    # The other two always tell it.
    usage = {} if path in ("/v1/responses", "/v1/messages") else {"include_usage": True}
    return path, {**body, "stream": True, **({"stream_options": usage} if usage else {})}


TEXTS = {"content", "text", "delta", "arguments", "partial_json", "output_text", "thinking"}


def texts(value: Any) -> Iterator[str]:
    """Yield the texts of a JSON value, in order."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name in TEXTS and isinstance(item, str):
                yield item
            else:
                yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
