"""An engine's context, template and account of itself; engines that pool, that reason, that die.

On tiny models with random weights: what they answer is nonsense, the same every time.
"""

import asyncio
import base64
import os
import signal
import struct
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from errors import EngineDead, RequestError
from protocol import GENERATE
from tests.conformance.reference import WEATHER
from tests.engines import (
    CHAT,
    TINY,
    Engine,
    ask,
    build,
    cache_tokens,
    call,
    eventually,
    generate,
    make_thinker,
    read,
    running,
    started,
    user,
)
from tools import tiny_models

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:::vllm"),
]

OPTIONS = {"MAX_MODEL_LEN": "256", "ENABLE_AUTO_TOOL_CHOICE": "true", "TOOL_CALL_PARSER": "hermes"}


@pytest.fixture(scope="module")
def built() -> Engine:
    return build(TINY, "tiny", **OPTIONS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(built: Engine) -> AsyncIterator[Engine]:
    async with started(built) as engine:
        yield engine


async def test_the_estimate_of_the_kv_cache_is_what_the_engine_counts(engine: Engine) -> None:
    counted, estimated = cache_tokens(engine)
    assert counted == estimated


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
    assert about["tasks"] == ["generate", "chat", "tools"]
    listed = await ask(engine, "/v1/models", None, method="GET")
    assert [card["tasks"] for card in listed.json["data"]] == [about["tasks"]]
    assert CHAT in about["routes"] and "/v1/embeddings" not in about["routes"]


async def test_other_models_routes_are_not_there(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"this worker has .*/v1/chat/completions") as raised:
        await ask(engine, "/v1/embeddings", {"model": "tiny", "input": "x"})
    assert raised.value.status == 404


# --- pooling ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_pooling() -> Engine:
    path = tiny_models.MODELS / "tiny-embed"
    tiny_models.make_tiny_embed(path)
    return build(path, "embed", MAX_MODEL_LEN="128")


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
    assert pooling.tasks == ("embed", "score", "pool")
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
        if process.is_running()
        and process.ppid() == os.getpid()
        and "resource_tracker" not in " ".join(process.cmdline())
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
