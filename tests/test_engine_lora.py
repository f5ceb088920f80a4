"""LoRA adapters on a real engine: loaded at its start, chosen by `model`, or else no start."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine_adapters import Adapter
from errors import ConfigError, RequestError
from protocol import GENERATE
from tests.adapters import make_adapter
from tests.engines import CHAT, TINY, Engine, ask, build, generate, started, user

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:::vllm"),
]

NAMES = ("tiny", "org/alpha", "beta")

BROKEN: dict[str, dict[str, Any]] = {
    "elsewhere": {"modules": ("self_attn.nowhere",)},
    "dora": {"use_dora": True},
    "large": {"rank": 64},
}
"""What the files show or do not show, but the engine finds out: here nothing else has looked."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def built(folder: Path) -> Engine:
    adapters = [
        Adapter("org/alpha", make_adapter(folder / "alpha", rank=4, seed=1), 4, ""),
        Adapter("beta", make_adapter(folder / "beta", rank=12, seed=2), 12, ""),
    ]
    return build(TINY, "tiny", adapters, MAX_MODEL_LEN="256")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def refusals(built: Engine, folder: Path) -> dict[str, str]:
    """Return what the start said to each broken adapter; the engine is as new afterwards."""
    whole, said = built.adapters, {}
    for name, made in BROKEN.items():
        path = make_adapter(folder / name, **made)
        built.adapters = (Adapter(f"org/{name}", path, 4, ""),)
        with pytest.raises(ConfigError) as raised:
            await built.start()
        said[name] = str(raised.value)
    built.adapters = whole
    return said


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(built: Engine, refusals: dict[str, str]) -> AsyncIterator[Engine]:
    async with started(built) as engine:
        yield engine


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("elsewhere", "expected target modules"),
        ("dora", "does not yet support DoRA"),
        ("large", "rank 64 is greater than max_lora_rank 16"),
    ],
)
async def test_an_adapter_that_does_not_load_stops_the_start_by_name(
    refusals: dict[str, str], name: str, reason: str
) -> None:
    assert refusals[name].startswith(f"- the adapter org/{name} cannot be served: ")
    assert reason in refusals[name]
    assert "stack trace" not in refusals[name]


async def test_they_are_told_beside_their_base(engine: Engine) -> None:
    assert engine.about()["models"] == list(NAMES)
    cards = (await ask(engine, "/v1/models", None, method="GET")).json["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("tiny", None),
        ("org/alpha", "tiny"),
        ("beta", "tiny"),
    ]
    assert all(card["tasks"] == ["generate", "chat"] for card in cards)
    lora = engine.config.lora_config
    assert lora is not None
    assert (lora.max_loras, lora.max_cpu_loras, lora.max_lora_rank) == (2, 2, 16)


async def said(engine: Engine, route: str, model: str) -> str:
    """Return the text with which a model answers on a route."""
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "Hello", "max_tokens": 8, "temperature": 0},
        CHAT: {"messages": user("Hello"), "max_tokens": 8, "temperature": 0},
        "/v1/responses": {"input": "Hello", "max_output_tokens": 16, "temperature": 0},
        "/v1/messages": {"messages": user("Hello"), "max_tokens": 8, "temperature": 0},
    }
    if route == GENERATE:
        return (await generate(engine, prompt="Hello", max_tokens=8, model=model)).text
    answer = await ask(engine, route, {"model": model, **bodies[route]})
    assert answer.status == 200, answer.body
    assert answer.json["model"] == model
    for member in ("id", "created", "created_at", "completed_at"):
        answer.json.pop(member, None)
    match answer.json:
        case {"choices": [{"text": str(text)}]}:
            return text
        case {"choices": [{"message": {"content": str(text)}}]}:
            return text
        case {"output": [{"content": [{"text": str(text)}]}]} | {"content": [{"text": str(text)}]}:
            return text
    raise AssertionError(answer.body)


@pytest.mark.parametrize(
    "route", [GENERATE, "/v1/completions", CHAT, "/v1/responses", "/v1/messages"]
)
async def test_model_chooses_on_every_route(engine: Engine, route: str) -> None:
    answers = [await said(engine, route, name) for name in NAMES]
    assert len(set(answers)) == len(NAMES)
    assert [await said(engine, route, name) for name in reversed(NAMES)] == answers[::-1]


async def test_with_tools_too(engine: Engine) -> None:
    # By way of the chat route, which must be asked for the same model.
    with pytest.raises(RequestError, match="--tool-call-parser"):
        await generate(engine, messages=user("x"), model="beta", tools=[TOOL])


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (GENERATE, {"prompt": "x"}),
        (GENERATE, {"messages": user("x"), "tools": [TOOL]}),
        (CHAT, {"messages": user("x")}),
        (CHAT, {"messages": user("x"), "stream": True}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": user("x"), "max_tokens": 2}),
        ("/v1/messages/count_tokens", {"messages": user("x")}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
async def test_an_unlisted_model_is_a_404_that_names_what_is_served(
    engine: Engine, route: str, body: dict[str, Any]
) -> None:
    error, status = await refused(engine, route, {"model": "nope", **body})
    assert status == 404
    assert error["type"] == "NotFoundError"
    assert error["message"] == (
        "The model `nope` does not exist; this worker has tiny, org/alpha, beta"
    )


async def refused(engine: Engine, route: str, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the error of a refused request in whichever form, and its status."""
    if route == GENERATE:
        with pytest.raises(RequestError) as raised:
            await ask(engine, route, body)
        return raised.value.body()["error"], raised.value.status
    answer = await ask(engine, route, body)
    return answer.json["error"], answer.status


async def test_no_two_models_share_a_cached_prefix(engine: Engine) -> None:
    prompt = "A long beginning that is the same for everybody. " * 16
    for name in NAMES:
        answer = await generate(engine, prompt=prompt, max_tokens=2, model=name)
        assert answer.cached_tokens == 0
    assert (await generate(engine, prompt=prompt, max_tokens=2, model="beta")).cached_tokens > 0


async def test_the_files_are_left_as_they_were(folder: Path, engine: Engine) -> None:
    assert json.loads((folder / "alpha" / "adapter_config.json").read_bytes())["r"] == 4
