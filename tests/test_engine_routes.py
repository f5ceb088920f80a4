"""vLLM's routes at parity with its own server; engines that pool, that reason, that die.

On tiny models with random weights: what they answer is nonsense, the same every time.
"""

import asyncio
import base64
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import psutil
import pytest
import pytest_asyncio

from errors import EngineDead, RequestError
from frames import Head, Kind
from protocol import GENERATE
from tests.engines import (
    CHAT,
    SMALL,
    TINY,
    Answer,
    Engine,
    ask,
    build,
    call,
    eventually,
    generate,
    make_thinker,
    read,
    running,
    started,
    user,
)
from tests.wait import until

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:::vllm"),
]

OPTIONS = {"MAX_MODEL_LEN": "256", "ENABLE_AUTO_TOOL_CHOICE": "true", "TOOL_CALL_PARSER": "hermes"}
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


@pytest.fixture(scope="module")
def built() -> Engine:
    return build(TINY, "tiny", **OPTIONS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(built: Engine) -> AsyncIterator[Engine]:
    async with started(built) as engine:
        yield engine


# --- parity with vLLM's own server ------------------------------------------------------------


@pytest.fixture(scope="module")
def server(built: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """vLLM's own server on the same model with the same settings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += [f"--model={TINY}", "--served-model-name=tiny", "--host=127.0.0.1", f"--port={port}"]
    command += ["--enforce-eager", "--max-model-len=256", "--disable-log-stats"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser=hermes"]
    command += [f"--kv-cache-memory-bytes={SMALL['KV_CACHE_MEMORY_BYTES']}"]
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
        return re.sub(r"\b(chatcmpl|cmpl|resp|msg|modelperm|fc|call|rs|toolu)[-_]\w+", r"\1", value)
    return value


PARITY: dict[str, tuple[str, Any]] = {
    "models": ("/v1/models", None),
    "version": ("/version", None),
    "tokenize": (
        "/tokenize",
        {"model": "tiny", "prompt": "Hello there", "return_token_strs": True},
    ),
    "tokenize messages": ("/tokenize", {"model": "tiny", "messages": user("Hello")}),
    "detokenize": ("/detokenize", {"model": "tiny", "tokens": [100, 200, 300]}),
    "chat": (CHAT, {"messages": user("Hello"), "max_tokens": 8}),
    "chat, no limit": (CHAT, {"messages": user("Hello")}),
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
    "too long": (CHAT, {"messages": user("x " * 400)}),
    "out of range": (CHAT, {"messages": user("x"), "temperature": 9}),
    "wrong type": (CHAT, {"messages": "x"}),
    "wrong role": (CHAT, {"messages": [{"role": "nobody", "content": "x"}]}),
    "huge number": (CHAT, {"messages": user("x"), "max_tokens": 10**30}),
    "no messages": (CHAT, {}),
    "not JSON": (CHAT, b"{"),
    "not an object": ("/v1/completions", b"[]"),
    "anthropic error": ("/v1/messages", {"messages": user("Hello")}),
    "responses error": ("/v1/responses", {"input": 5}),
    "schema error": (
        CHAT,
        {"messages": user("x"), "structured_outputs": {"json": {"type": "nope"}}},
    ),
}


def _request(body: Any) -> Any:
    if isinstance(body, dict):
        return {"model": "tiny", **({} if "tokens" in body else {"temperature": 0}), **body}
    return body


@pytest.mark.parametrize("name", PARITY)
async def test_a_route_answers_what_vllms_own_server_answers(
    engine: Engine, server: httpx2.Client, name: str
) -> None:
    path, body = PARITY[name]
    body = _request(body)
    if body is None:
        theirs = server.get(path)
        ours = await ask(engine, path, None, method="GET")
    else:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        theirs = await asyncio.to_thread(
            server.post, path, content=content, headers={"Content-Type": "application/json"}
        )
        ours = await ask(engine, path, content)
    assert ours.head == Head(theirs.status_code, "body", theirs.headers["content-type"])
    assert constant(ours.json) == constant(theirs.json())


def _paths(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of a JSON value's members."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _paths(item, f"{path}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item, f"{path}[]")
    else:
        yield path


TEXTS = {"content", "text", "delta", "arguments", "partial_json", "output_text", "thinking"}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name in TEXTS and isinstance(item, str):
                yield item
            else:
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


STREAMED = [
    *("chat", "chat, logprobs", "chat, choices", "chat, schema", "chat, tool"),
    *("completions", "responses", "messages", "unknown model", "too long", "huge number"),
]


@pytest.mark.parametrize("name", STREAMED)
async def test_a_streamed_route_says_what_vllms_own_server_says(
    engine: Engine, server: httpx2.Client, name: str
) -> None:
    """Where events begin and end depends on timing; their members and their text do not."""
    path, body = PARITY[name]
    body = {**_request(body), "stream": True}
    if path != "/v1/responses" and path != "/v1/messages":
        body["stream_options"] = {"include_usage": True}
    theirs = await asyncio.to_thread(server.post, path, json=body)
    ours = await ask(engine, path, body)
    kind: Kind = "sse" if theirs.status_code == 200 else "body"
    assert ours.head == Head(theirs.status_code, kind, theirs.headers["content-type"])
    if kind == "body":
        assert constant(ours.json) == constant(theirs.json())
        return
    reference = Answer(sse=[part for part in theirs.content.split(b"\n\n") if part])
    assert ours.sse[-1].splitlines()[0] == reference.sse[-1].splitlines()[0]
    assert set(_paths(ours.chunks)) == set(_paths(reference.chunks))
    assert constant(ours.chunks[0]) == constant(reference.chunks[0])
    assert constant(ours.chunks[-1]) == constant(reference.chunks[-1])
    if name == "chat, choices":  # the choices take turns as they like
        return
    assert "".join(_texts(constant(ours.chunks))) == "".join(_texts(constant(reference.chunks)))


# --- the context ------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_without_max_tokens_the_answer_may_fill_the_context(
    engine: Engine, stream: bool
) -> None:
    for body in ({"prompt": "Hello"}, {"messages": user("Hello")}):
        answer = await generate(engine, ignore_eos=True, stream=stream, **body)
        assert answer.usage["total_tokens"] == 256
        assert answer.finish_reason == "length"
    tools = await generate(
        engine, ignore_eos=True, stream=stream, messages=user("Hello"), tools=[WEATHER]
    )
    assert tools.usage["total_tokens"] == 256


async def test_a_prompt_of_the_whole_context_is_refused_and_one_less_is_not(
    engine: Engine,
) -> None:
    assert (await generate(engine, prompt=[100] * 255)).usage["completion_tokens"] == 1
    with pytest.raises(RequestError, match="256"):
        await generate(engine, prompt=[100] * 256)


async def test_a_request_brings_no_chat_template(engine: Engine) -> None:
    kwargs = {"chat_template": "{{ 'mine' }}"}
    with pytest.raises(RequestError, match="chat template"):
        await generate(engine, messages=user("x"), chat_template_kwargs=kwargs, max_tokens=1)
    with_tools: dict[str, Any] = {
        "messages": user("x"),
        "chat_template_kwargs": kwargs,
        "tools": [WEATHER],
    }
    with pytest.raises(RequestError, match="chat template"):
        await generate(engine, max_tokens=1, **with_tools)


async def test_the_worker_tells_what_the_engine_is(engine: Engine) -> None:
    about = engine.about()
    assert about["models"] == ["tiny"]
    assert about["max_model_len"] == engine.max_model_len == 256
    assert about["max_num_seqs"] == engine.max_concurrency > 0
    assert "generate" in about["tasks"]
    assert CHAT in about["routes"] and "/v1/embeddings" not in about["routes"]


async def test_other_models_routes_are_not_there(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"this worker has .*/v1/chat/completions") as raised:
        await ask(engine, "/v1/embeddings", {"model": "tiny", "input": "x"})
    assert raised.value.status == 404


# --- pooling ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_pooling() -> Engine:
    return build(TINY, "embed", RUNNER="pooling", CONVERT="embed", MAX_MODEL_LEN="128")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pooling(built_pooling: Engine) -> AsyncIterator[Engine]:
    async with started(built_pooling) as engine:
        yield engine


async def test_embeddings_as_numbers_and_as_base64(pooling: Engine) -> None:
    body = {"model": "embed", "input": ["Hello", "there"]}
    numbers = await ask(pooling, "/v1/embeddings", body)
    assert numbers.status == 200
    vectors = [entry["embedding"] for entry in numbers.json["data"]]
    assert len(vectors) == 2 and len(vectors[0]) == 64 and vectors[0] != vectors[1]
    packed = await ask(pooling, "/v1/embeddings", {**body, "encoding_format": "base64"})
    data = base64.b64decode(packed.json["data"][0]["embedding"])
    assert struct.unpack("<64f", data) == pytest.approx(vectors[0], abs=1e-3)
    assert numbers.usage["prompt_tokens"] == numbers.json["usage"]["prompt_tokens"] > 0


async def test_scores_and_ranks(pooling: Engine) -> None:
    body: dict[str, Any] = {"model": "embed", "text_1": "Hello", "text_2": ["Hello", "Once upon"]}
    scores = [entry["score"] for entry in (await ask(pooling, "/v1/score", body)).json["data"]]
    assert scores[0] == pytest.approx(1, abs=1e-2) and scores[1] < scores[0]
    body = {"model": "embed", "query": "Hello", "documents": ["Once upon", "Hello"]}
    ranked = (await ask(pooling, "/v1/rerank", body)).json["results"]
    assert [entry["index"] for entry in ranked] == [1, 0]


async def test_a_pooling_model_has_no_chat(pooling: Engine) -> None:
    for route, body in (
        (CHAT, {"model": "embed", "messages": user("x")}),
        (GENERATE, {"prompt": "x"}),
        (GENERATE, {"messages": user("x"), "stream": False}),
    ):
        with pytest.raises(RequestError, match=r"this worker has .*/v1/embeddings") as raised:
            await ask(pooling, route, body)
        assert raised.value.status == 404
    too_long = await ask(pooling, "/v1/embeddings", {"model": "embed", "input": "x " * 300})
    assert too_long.status == 400
    assert not pooling.dead


# --- reasoning; and at last the engine's death ------------------------------------------------


@pytest.fixture(scope="module")
def thinker_and_its_processes(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Engine, list[psutil.Process]]:
    before = set(psutil.Process().children(recursive=True))
    engine = build(
        make_thinker(tmp_path_factory.mktemp("models")),
        "thinker",
        MAX_MODEL_LEN="512",
        REASONING_PARSER="deepseek_r1",
        STRUCTURED_OUTPUTS_CONFIG='{"enable_in_reasoning": true}',
    )
    return engine, list(set(psutil.Process().children(recursive=True)) - before)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def thinker(
    thinker_and_its_processes: tuple[Engine, list[psutil.Process]],
) -> AsyncIterator[Engine]:
    async with started(thinker_and_its_processes[0]) as engine:
        yield engine


@pytest.mark.parametrize("stream", [True, False])
async def test_reasoning_and_answer_are_told_apart(thinker: Engine, stream: bool) -> None:
    think = {str(thinker.tokenizer.encode(word)[0]): 100 for word in ("<think>", "</think>")}
    answer = await generate(
        thinker,
        messages=user("Where?"),
        structured_outputs={"regex": "<think>(hmm|well)</think>Paris"},
        logit_bias=think,
        stream=stream,
        max_tokens=40,
    )
    assert "".join(answer.all("reasoning")) in ("hmm", "well")
    assert answer.text == "Paris"
    assert answer.finish_reason == "stop"


async def test_the_engines_death_ends_every_run(
    thinker: Engine, thinker_and_its_processes: tuple[Engine, list[psutil.Process]]
) -> None:
    endless = {"temperature": 0, "max_tokens": 400, "ignore_eos": True}
    runs = [
        thinker.run(call(route, body), "salt")
        for route, body in (
            (GENERATE, {"prompt": "x", "sampling_params": endless}),
            (GENERATE, {"prompt": "x", "sampling_params": endless, "stream": False}),
            (CHAT, {"model": "thinker", "messages": user("x"), "stream": True, **endless}),
            (CHAT, {"model": "thinker", "messages": user("x"), **endless}),
        )
    ]
    reading = [asyncio.create_task(read(run)) for run in runs]
    assert await eventually(lambda: running(thinker) == len(runs))
    (core,) = [
        process
        for process in thinker_and_its_processes[1]
        if process.is_running() and process.ppid() == os.getpid() and "Core" in _title(process)
    ]
    core.send_signal(signal.SIGKILL)
    assert await eventually(lambda: thinker.dead, 2)
    for outcome in await asyncio.wait_for(asyncio.gather(*reading, return_exceptions=True), 10):
        assert isinstance(outcome, EngineDead)
    for route, body in ((GENERATE, {"prompt": "x"}), (CHAT, {"model": "thinker", "messages": []})):
        with pytest.raises(EngineDead):
            await ask(thinker, route, body)
    for run in runs:
        await asyncio.wait_for(run.aclose(), 1)


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline()) or process.name()
