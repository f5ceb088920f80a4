"""The engine through its door, `Engine.run`, on the real vLLM with the demo model.

Tests of isolation and of cancellation are paired with a weakened engine on which the same
check fails.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from asgi import AsgiCall
from errors import RequestError
from frames import Head
from protocol import GENERATE
from tests.engines import (
    CHAT,
    DEMO,
    Answer,
    Engine,
    Run,
    ask,
    build,
    cache_tokens,
    call,
    eventually,
    generate,
    idle,
    read,
    running,
    started,
    user,
)

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:::vllm"),
]

CAPITAL = user("What is the capital of France?")
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "size": {"enum": ["small", "large"]},
    },
    "required": ["city", "size"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
        "strict": True,
    },
}
LONG = " ".join(f"Fact {number} is that {number} follows {number - 1}." for number in range(30))
"""A prompt of several blocks of the prefix cache."""


@pytest.fixture(scope="module")
def built() -> Engine:
    template = (DEMO / "chat_template.jinja").read_text()
    return build(
        DEMO,
        "demo",
        MAX_MODEL_LEN="1024",
        ENABLE_AUTO_TOOL_CHOICE="true",
        TOOL_CALL_PARSER="hermes",
        CHAT_TEMPLATE="{{ mood }}" + template,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(built: Engine) -> AsyncIterator[Engine]:
    async with started(built) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_is_left(engine: Engine) -> AsyncIterator[None]:
    yield
    assert await eventually(lambda: running(engine) == 0), "the test left a request behind"


async def test_the_estimate_of_the_kv_cache_is_what_the_engine_counts(engine: Engine) -> None:
    counted, estimated = cache_tokens(engine)
    assert counted == estimated


# --- generate: what goes in -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "options", "template"),
    [
        (CAPITAL, {}, {"add_generation_prompt": True}),
        (CAPITAL, {"add_generation_prompt": False}, {"add_generation_prompt": False}),
        (
            CAPITAL,
            {"chat_template_kwargs": {"mood": "Be kind."}},
            {"add_generation_prompt": True, "mood": "Be kind."},
        ),
        (
            [*CAPITAL, {"role": "assistant", "content": "It is the city of"}],
            {"continue_final_message": True},
            {"continue_final_message": True},
        ),
    ],
)
async def test_messages_go_through_the_chat_template(
    engine: Engine, messages: Any, options: dict[str, Any], template: dict[str, Any]
) -> None:
    expected = engine.tokenizer.apply_chat_template(
        messages, chat_template=engine.args.chat_template, tokenize=False, **template
    )
    answer = await generate(engine, messages=messages, max_tokens=1, prompt_logprobs=0, **options)
    (positions,) = answer.all("prompt_logprobs")
    assert positions[0] is None
    seen = [int(next(iter(position))) for position in positions[1:]]
    assert seen == engine.tokenizer.encode(expected, add_special_tokens=False)[1:]
    assert answer.usage["prompt_tokens"] == len(positions)


async def test_streamed_or_whole_the_answer_is_the_same(engine: Engine) -> None:
    streamed = await generate(engine, messages=CAPITAL, max_tokens=30)
    whole = await generate(engine, messages=CAPITAL, max_tokens=30, stream=False)
    assert streamed.text == whole.text == "The capital of France is Paris."
    assert streamed.head == whole.head == Head(200, "generate", "")
    assert streamed.finish_reason == whole.finish_reason == "stop"
    assert streamed.usage["completion_tokens"] == whole.usage["completion_tokens"] == 8
    assert len(whole.batches) == 1
    assert len(streamed.batches) > 3
    assert streamed.end is not None
    times = streamed.end.timings
    assert 0 <= times["queue_ms"] <= times["first_token_ms"] <= times["total_ms"]


async def test_a_prompt_is_taken_as_it_is_as_text_or_token_ids(engine: Engine) -> None:
    text = "The capital of France is"
    token_ids = engine.tokenizer.encode(text)
    by_text = await generate(engine, prompt=text, max_tokens=4)
    by_ids = await generate(engine, prompt=token_ids, max_tokens=4)
    assert by_text.text == by_ids.text
    assert "Paris" in by_text.text
    assert by_text.usage["prompt_tokens"] == by_ids.usage["prompt_tokens"] == len(token_ids)


async def test_parts_of_content_are_joined(engine: Engine) -> None:
    parts = [{"type": "text", "text": CAPITAL[0]["content"]}]
    answer = await generate(engine, messages=[{"role": "user", "content": parts}], max_tokens=8)
    assert "Paris" in answer.text


# --- generate: sampling -----------------------------------------------------------------------


async def test_a_seed_repeats_the_answer(engine: Engine) -> None:
    async def text(seed: int) -> str:
        return (
            await generate(engine, prompt="Once", seed=seed, temperature=1.5, max_tokens=8)
        ).text

    assert await text(1) == await text(1)
    assert await text(1) != await text(2)


async def test_several_choices(engine: Engine) -> None:
    answer = await generate(
        engine, prompt="Once", n=3, seed=1, temperature=1.5, max_tokens=5, ignore_eos=True
    )
    assert set(answer.texts) == {0, 1, 2}
    assert len(set(answer.texts.values())) > 1
    assert [answer.all("finish_reason", index) for index in range(3)] == [["length"]] * 3
    assert answer.usage["completion_tokens"] == 15
    assert answer.usage["prompt_tokens"] == 1


async def test_a_stop_string_ends_the_answer(engine: Engine) -> None:
    answer = await generate(engine, messages=CAPITAL, stop=["Paris"], max_tokens=30)
    assert answer.text == "The capital of France is "
    assert answer.all("stop_reason") == ["Paris"]
    kept = await generate(
        engine, messages=CAPITAL, stop="Par", include_stop_str_in_output=True, max_tokens=30
    )
    assert kept.text == "The capital of France is Par"


async def test_logprobs_come_for_every_token(engine: Engine) -> None:
    answer = await generate(engine, messages=CAPITAL, logprobs=2, max_tokens=30)
    entries = answer.logprobs
    assert len(entries) == answer.usage["completion_tokens"]
    assert "".join(entry["token"] for entry in entries[:-1]) == answer.text
    for entry in entries:
        assert entry["logprob"] <= 0
        assert len(entry["top"]) == 2
        assert entry["top"][0]["token_id"] == entry["token_id"]  # temperature 0 takes the best
    no_top = await generate(engine, messages=CAPITAL, logprobs=0, max_tokens=2)
    assert [len(entry["top"]) for entry in no_top.logprobs] == [1, 1]


async def test_parameters_change_the_answer(engine: Engine) -> None:
    the = engine.tokenizer.encode("The")[0]
    biased = await generate(engine, messages=CAPITAL, logit_bias={str(the): -100}, max_tokens=3)
    assert biased.text and not biased.text.startswith("The")
    only = await generate(engine, messages=CAPITAL, allowed_token_ids=[the], max_tokens=3)
    assert only.text == "TheTheThe"
    longer = await generate(engine, messages=CAPITAL, min_tokens=12, max_tokens=12)
    assert longer.usage["completion_tokens"] == 12
    word = await generate(engine, messages=CAPITAL, bad_words=["capital"], max_tokens=5)
    assert "capital" not in word.text


HUGE = 10**30


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temprature", 1),
        *(("temperature", value) for value in ("hot", -1, 3, 5e300, None, [1])),
        *(("top_p", value) for value in (0, 2, "x")),
        *(("top_k", value) for value in (-5, 1.5, HUGE)),
        *(("min_p", value) for value in (2, -1)),
        *(("n", value) for value in (0, 2, 10**6, True, HUGE)),
        *(("max_tokens", value) for value in (0, -1, "many", HUGE, 2**63)),
        *(("min_tokens", value) for value in (-1, 6)),
        *(("presence_penalty", value) for value in (3, "x")),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        *(("seed", value) for value in ("x", HUGE, 2**63, 1.5)),
        *(("logprobs", value) for value in (-3, 50, HUGE)),
        ("prompt_logprobs", 50),
        *(("stop", value) for value in ([""], 3, [3])),
        *(("stop_token_ids", value) for value in (["a"], [10**12], [HUGE], [-1])),
        *(("bad_words", value) for value in ([""], "x")),
        *(("logit_bias", value) for value in ({"x": 1}, {"999999": 1}, [1], {"5": "x"})),
        *(("allowed_token_ids", value) for value in ([], [10**7], [-1])),
        *(("ignore_eos", value) for value in ("yes", 1)),
        *(("thinking_token_budget", value) for value in (3,)),
        ("repetition_detection", {"size": 1}),
        # vLLM's own business, and what other routes take.
        *(("output_kind", 1), ("detokenize", False), ("extra_args", {}), ("cache_salt", "x")),
        *(("stream_interval", 5), ("priority", 1), ("skip_reading_prefix_cache", True)),
        ("truncate_prompt_tokens", 1),
        *(("structured_outputs", value) for value in ("x", {}, {"nope": 1}, {"choice": "abc"})),
        ("structured_outputs", {"choice": ["a"], "regex": "b"}),
        ("structured_outputs", {"_backend": "x", "regex": "b"}),
    ],
)
async def test_a_parameter_that_is_wrong_is_named(engine: Engine, name: str, value: Any) -> None:
    params = {"max_tokens": 5, "temperature": 0, name: value}
    with pytest.raises(RequestError) as raised:
        await generate(engine, prompt="Hello", sampling_params=params)
    assert raised.value.status == 400
    assert raised.value.param == name
    assert name in str(raised.value)
    assert not engine.dead


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": "x " * 3000}, 400, "1024"),
        ({"prompt": [5] * 1024}, 400, "1024"),
        ({"prompt": [10**9]}, 400, "vocab"),
        ({"prompt": [-1]}, 400, ""),
        ({"prompt": [HUGE]}, 400, ""),
        ({"prompt": ["a"]}, 400, "prompt"),
        ({"prompt": "x", "model": "nope"}, 404, "demo"),
        ({"prompt": "x", "tools": [WEATHER]}, 400, "messages"),
        ({"prompt": "x", "structured_outputs": {"regex": "[0-"}}, 400, ""),
        ({"prompt": "x", "structured_outputs": {"json": {"type": "nope"}}}, 400, ""),
        ({"prompt": "x", "structured_outputs": {"grammar": "::"}}, 400, ""),
        ({"prompt": "x", "response_format": {"type": "nope"}}, 400, "response_format"),
        ({"messages": [{"content": "no role"}]}, 400, "messages"),
        ({"messages": [{}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{}]}]}, 400, ""),
        ({"messages": [{"role": "user", "content": [{"type": "nope"}]}]}, 400, ""),
        ({"messages": CAPITAL, "chat_template_kwargs": {"chat_template": "x"}}, 400, "template"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, ""),
        ({"messages": CAPITAL, "tools": [{"type": "nope"}]}, 400, ""),
        ({"messages": CAPITAL, "tools": [WEATHER], "tool_choice": "sometimes"}, 400, ""),
        (
            {"messages": CAPITAL, "continue_final_message": True, "add_generation_prompt": True},
            400,
            "add_generation_prompt",
        ),
    ],
)
async def test_a_request_that_cannot_be_served_says_why(
    engine: Engine, body: dict[str, Any], status: int, says: str
) -> None:
    with pytest.raises(RequestError) as raised:
        await generate(engine, max_tokens=2, **body)
    assert says in str(raised.value)
    assert raised.value.status == status
    assert not engine.dead


@pytest.mark.parametrize("body", [b"{", b"[]", b"", b'{"prompt":"x","nope":1}', b'{"prompt":NaN}'])
async def test_a_body_that_is_not_a_request_is_refused(engine: Engine, body: bytes) -> None:
    with pytest.raises(RequestError) as raised:
        await ask(engine, GENERATE, body)
    assert raised.value.status == 400


# --- generate: constraints, tools -------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-c]{2}"}}, "[0-9]{3}-[a-c]{2}"),
        ({"structured_outputs": {"json": CITY}}, r"\{.*\}"),
        ({"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}, "yes|no"),
        ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": CITY}}},
            r"\{.*\}",
        ),
        ({"response_format": {"type": "text"}}, ".+"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_answers_keep_to_a_constraint(
    engine: Engine, constraint: dict[str, Any], pattern: str, stream: bool
) -> None:
    answer = await generate(
        engine,
        messages=user("Tell me about Paris in JSON"),
        stream=stream,
        max_tokens=40,
        **constraint,
    )
    assert re.fullmatch(pattern, answer.text, re.DOTALL)
    if "CITY" in str(constraint) or "size" in str(constraint):
        value = json.loads(answer.text)
        assert set(value) == {"city", "size"}
        assert value["size"] in ("small", "large")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
async def test_the_model_calls_a_tool(engine: Engine, choice: Any, stream: bool) -> None:
    answer = await generate(
        engine,
        messages=user("Call the weather tool for Paris"),
        tools=[WEATHER],
        tool_choice=choice,
        stream=stream,
        max_tokens=60,
    )
    deltas = [delta for deltas in answer.all("tool_calls") for delta in deltas]
    assert {delta["index"] for delta in deltas} == {0}
    assert "".join(delta["function"].get("name") or "" for delta in deltas) == "weather"
    assert deltas[0]["id"]
    arguments = "".join(delta["function"].get("arguments") or "" for delta in deltas)
    assert "Paris" in json.dumps(json.loads(arguments))
    assert answer.text == ""
    assert answer.finish_reason in ("tool_calls", "stop")
    assert answer.usage["completion_tokens"] > 5


async def test_tools_that_the_model_does_not_call_leave_the_answer_alone(engine: Engine) -> None:
    options: dict[str, Any] = {"messages": CAPITAL, "max_tokens": 20, "logprobs": 1, "seed": 7}
    plain = await generate(engine, **options)
    with_tools = await generate(engine, tools=[WEATHER], tool_choice="none", **options)
    assert with_tools.text == plain.text
    assert with_tools.finish_reason == plain.finish_reason
    assert with_tools.usage == plain.usage
    tokens = [entry["token"] for entry in plain.logprobs]
    assert [entry["token"] for entry in with_tools.logprobs] == tokens


async def test_with_tools_parameters_are_checked_as_well(engine: Engine) -> None:
    for name, value in {"temprature": 1, "temperature": 9, "n": 0}.items():
        with pytest.raises(RequestError, match=name) as raised:
            params = {"temperature": 0, name: value}
            await generate(engine, messages=CAPITAL, tools=[WEATHER], sampling_params=params)
        assert raised.value.status == 400


async def test_an_answer_that_the_engine_gives_up_is_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM.generate

    async def giving_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        async for output in original(self, *args, **kwargs):
            for choice in output.outputs:
                choice.finish_reason = choice.finish_reason and "error"
            yield output

    monkeypatch.setattr(AsyncLLM, "generate", giving_up)
    for stream in (True, False):
        for tools in (None, [WEATHER]):
            with pytest.raises(RequestError) as raised:
                await generate(engine, messages=CAPITAL, max_tokens=2, stream=stream, tools=tools)
            assert raised.value.status == 500


# --- vLLM's own routes ------------------------------------------------------------------------


async def test_a_route_of_vllm_answers_like_an_http_server(engine: Engine) -> None:
    body = {"model": "demo", "messages": CAPITAL, "temperature": 0, "max_tokens": 20}
    whole = await ask(engine, CHAT, body)
    assert whole.head == Head(200, "body", "application/json")
    assert whole.json["choices"][0]["message"]["content"] == "The capital of France is Paris."
    streamed = await ask(engine, CHAT, {**body, "stream": True})
    assert streamed.head is not None
    assert (streamed.status, streamed.head.kind) == (200, "sse")
    assert streamed.sse[-1] == b"data: [DONE]"
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed.chunks]
    assert "".join(deltas) == "The capital of France is Paris."
    assert streamed.usage == whole.usage
    assert whole.usage["completion_tokens"] == whole.json["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    "path", ["/v1/nope", "", "/docs", "/metrics", "/v1/chat/completions/", "*"]
)
async def test_a_route_that_is_not_offered_is_a_404(engine: Engine, path: str) -> None:
    with pytest.raises(RequestError, match="/v1/chat/completions") as raised:
        await ask(engine, path, {})
    assert (raised.value.status, raised.value.type) == (404, "NotFoundError")


async def test_a_wrong_method_is_a_405(engine: Engine) -> None:
    for path, method in ((CHAT, "GET"), ("/v1/models", "POST")):
        with pytest.raises(RequestError) as raised:
            await ask(engine, path, {}, method=method)
        assert raised.value.status == 405


async def test_errors_of_a_route_come_as_its_answers(engine: Engine) -> None:
    for body, status in (
        ({"model": "nope", "messages": CAPITAL}, 404),
        ({"model": "demo", "messages": CAPITAL, "temperature": 9}, 400),
        ({"model": "demo", "messages": user("x " * 3000)}, 400),
        ({"model": "demo", "messages": CAPITAL, "seed": HUGE}, 400),
        (b"{", 400),
        (b"[]", 400),
    ):
        answer = await ask(engine, CHAT, body)
        assert answer.status == status
        assert answer.json["error"]["code"] == status
        assert answer.json["error"]["message"]


# --- cancellation -----------------------------------------------------------------------------

ENDLESS = {"temperature": 0, "max_tokens": 900, "ignore_eos": True}
FOREVER: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": (GENERATE, {"prompt": "Hello", "sampling_params": ENDLESS}),
    "generate, whole": (GENERATE, {"prompt": "Hello", "sampling_params": ENDLESS, "stream": False}),
    "generate, several choices": (
        GENERATE,
        {"prompt": "Hello", "sampling_params": {**ENDLESS, "temperature": 1, "n": 3}},
    ),
    "generate with tools": (
        GENERATE,
        {"messages": CAPITAL, "tools": [WEATHER], "sampling_params": ENDLESS},
    ),
    "chat": (CHAT, {"model": "demo", "messages": CAPITAL, "stream": True, **ENDLESS}),
    "chat, whole": (CHAT, {"model": "demo", "messages": CAPITAL, **ENDLESS}),
    "two completions": ("/v1/completions", {"model": "demo", "prompt": ["a", "b"], **ENDLESS}),
    "responses": (
        "/v1/responses",
        {
            "model": "demo",
            "input": "Count to a thousand, one number per line.",
            "max_output_tokens": 900,
            "stream": True,
        },
    ),
}


@contextlib.asynccontextmanager
async def being_read(
    engine: Engine, name: str, **more: Any
) -> AsyncIterator[tuple[Run, asyncio.Task[Answer]]]:
    """Have a run of FOREVER read by a task."""
    route, body = FOREVER[name]
    before = running(engine)
    run = engine.run(call(route, {**body, **more}), "salt")
    task = asyncio.create_task(read(run))
    try:
        assert await eventually(lambda: running(engine) > before), "it did not begin"
        yield run, task
    finally:
        await run.aclose()
        with contextlib.suppress(RequestError, asyncio.CancelledError):
            await task


@pytest.mark.parametrize("name", FOREVER)
async def test_closing_a_run_frees_the_engine_at_once(engine: Engine, name: str) -> None:
    async with being_read(engine, name) as (run, reading):
        await asyncio.wait_for(run.aclose(), 1)
        assert running(engine) == 0
        assert await eventually(lambda: idle(engine), 1), "blocks are still held"
        with pytest.raises(RequestError) as raised:
            await reading
        assert raised.value.status == 499


@pytest.mark.parametrize("name", ["generate", "chat"])
async def test_closing_frees_the_engine_while_the_reader_is_busy(engine: Engine, name: str) -> None:
    """As when a job is cancelled in the middle of a POST: nobody asks for the next batch."""
    run = engine.run(call(*FOREVER[name]), "salt")
    batches = run.batches()
    await anext(batches)
    assert running(engine) == 1
    await asyncio.wait_for(run.aclose(), 1)
    assert await eventually(lambda: idle(engine), 1)
    with pytest.raises(RequestError):
        async for _ in batches:
            pass


@pytest.mark.parametrize("cycles", range(8))
@pytest.mark.parametrize("name", ["generate", "chat", "chat, whole"])
async def test_a_run_closed_on_its_way_to_the_engine_never_runs(
    engine: Engine, name: str, cycles: int
) -> None:
    run = engine.run(call(*FOREVER[name]), "salt")
    reading = asyncio.create_task(read(run))
    for _ in range(cycles):
        await asyncio.sleep(0)
    await asyncio.wait_for(run.aclose(), 6)
    with pytest.raises(RequestError) as raised:
        await asyncio.wait_for(reading, 6)
    assert raised.value.status == 499
    assert await eventually(lambda: idle(engine), 1)


@pytest.mark.parametrize("name", ["generate", "chat", "chat, whole"])
async def test_without_the_abort_the_engine_goes_on(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above can fail: a run whose end is a plain cancel of its route leaks."""

    async def only_the_task(asgi: AsgiCall) -> None:
        asgi._task.cancel()

    async def nothing(self: Any, request_id: Any, internal: bool = False) -> None: ...

    async with being_read(engine, name) as (run, _):
        with monkeypatch.context() as weakened:
            weakened.setattr(type(engine.llm), "abort", nothing)
            weakened.setattr(AsgiCall, "aclose", only_the_task)
            await run.aclose()
            assert not await eventually(lambda: idle(engine), 1)


async def test_other_requests_go_on_undisturbed(engine: Engine) -> None:
    async with being_read(engine, "generate"), being_read(engine, "chat") as (victim, _):
        other = asyncio.create_task(generate(engine, prompt="Once", max_tokens=20, ignore_eos=True))
        assert await eventually(lambda: running(engine) == 3)
        await victim.aclose()
        assert running(engine) == 2
        assert (await other).usage["completion_tokens"] == 20


async def _close_one_of_two_with_the_same_id(engine: Engine) -> str:
    """Return how the other one ended."""
    short = {"max_tokens": 20, "request_id": "mine"}
    async with being_read(engine, "chat", request_id="mine") as (victim, _):
        run = engine.run(call(CHAT, {**FOREVER["chat"][1], **short}), "other")
        other = asyncio.create_task(read(run))
        assert await eventually(lambda: running(engine) == 2)
        await victim.aclose()
        chunks = (await asyncio.wait_for(other, 60)).chunks
        return str([c for chunk in chunks for c in chunk["choices"]][-1]["finish_reason"])


async def test_an_id_chosen_by_a_client_stops_nobody_else(engine: Engine) -> None:
    assert await _close_one_of_two_with_the_same_id(engine) == "length"


async def test_with_ids_left_alone_one_client_stops_another(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from engine_tracking import TrackedLLM, current_call

    async def add_request(self: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        tracked = current_call.get()
        assert tracked is not None
        tracked.request_ids.add(request_id)
        return await AsyncLLM.add_request(self, request_id, *args, **kwargs)

    monkeypatch.setattr(TrackedLLM, "add_request", add_request)
    assert await _close_one_of_two_with_the_same_id(engine) != "length"


# --- isolation --------------------------------------------------------------------------------

CACHED: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": (GENERATE, {"prompt": LONG, "sampling_params": {"max_tokens": 1}}),
    "chat": (CHAT, {"model": "demo", "messages": user(LONG), "max_tokens": 1}),
    "completions": ("/v1/completions", {"model": "demo", "prompt": LONG, "max_tokens": 1}),
    "tools": (
        GENERATE,
        {"messages": user(LONG), "tools": [WEATHER], "sampling_params": {"max_tokens": 1}},
    ),
}


@pytest.mark.claim(
    "clients.cache",
    "What one client has asked is in the prefix cache for itself and for no other, whatever "
    "`cache_salt` that one asks for.",
)
@pytest.mark.parametrize("name", CACHED)
async def test_the_prefix_cache_is_shared_within_a_salt_only(engine: Engine, name: str) -> None:
    route, body = CACHED[name]
    await eventually(lambda: idle(engine))  # an empty cache
    assert (await ask(engine, route, body, salt="a")).cached_tokens == 0
    assert (await ask(engine, route, body, salt="a")).cached_tokens > 100
    assert (await ask(engine, route, body, salt="b")).cached_tokens == 0


async def _seen_by_vllm(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return salt, priority and cached tokens of two clients that both bring their own."""
    from vllm.v1.engine.async_llm import AsyncLLM

    seen: list[Any] = []
    add_request, generate = AsyncLLM.add_request, AsyncLLM.generate

    async def watched_add(
        self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any
    ) -> Any:
        seen.append((prompt.get("cache_salt"), kwargs["priority"]))
        return await add_request(self, request_id, prompt, *args, **kwargs)

    async def watched_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        async with contextlib.aclosing(generate(self, *args, **kwargs)) as outputs:
            async for output in outputs:
                cached = output.num_cached_tokens
                yield output
        seen.append(cached)

    route, body = CACHED["chat"]
    await eventually(lambda: idle(engine))
    with monkeypatch.context() as watched:
        watched.setattr(AsyncLLM, "add_request", watched_add)
        watched.setattr(AsyncLLM, "generate", watched_generate)
        for salt in ("a", "b"):
            body = {**body, "cache_salt": "mine", "priority": 5}
            assert (await ask(engine, route, body, salt=salt)).status == 200
    return seen


@pytest.mark.claim("clients.cache")
async def test_a_clients_own_salt_and_priority_are_ignored(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await _seen_by_vllm(engine, monkeypatch) == [("a", 0), 0, ("b", 0), 0]


@pytest.mark.claim("clients.cache")
async def test_without_the_workers_salt_clients_meet_in_the_cache(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from engine_tracking import TrackedLLM

    async def untracked(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await AsyncLLM.add_request(self, *args, **kwargs)

    monkeypatch.setattr(TrackedLLM, "add_request", untracked)
    first, none, second, cached = await _seen_by_vllm(engine, monkeypatch)
    assert first == second == ("mine", 5)
    assert none == 0
    assert cached > 100


# --- load and slow readers --------------------------------------------------------------------

GLYPHS = "日本語の文章と中文汉字 👩‍👩‍👧 🙂🚀 Ω≈ç√ " * 2


@pytest.mark.parametrize("route", [GENERATE, CHAT])
async def test_a_slow_reader_gets_the_same_text_in_fewer_batches(
    engine: Engine, route: str
) -> None:
    choice = {"temperature": 0, "structured_outputs": {"choice": [GLYPHS]}}
    body: dict[str, Any] = {"messages": CAPITAL, "stream": True}
    if route == GENERATE:
        body["sampling_params"] = choice
    else:
        body |= {"model": "demo", **choice}
    fast = await ask(engine, route, body)
    slow = await read(engine.run(call(route, body), "salt"), pause_s=0.4)

    def text(answer: Any) -> str:
        if route == GENERATE:
            return str(answer.text)
        return "".join(
            choice["delta"].get("content") or ""
            for chunk in answer.chunks
            for choice in chunk["choices"]
        )

    assert text(fast) == text(slow) == GLYPHS
    assert slow.usage["completion_tokens"] == fast.usage["completion_tokens"] > 30
    assert len(slow.batches) < len(fast.batches)


@pytest.mark.parametrize("whole_way", [True, False])
async def test_under_load_streams_put_out_several_tokens_at_a_time(
    engine: Engine, whole_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": "Once", "sampling_params": {**ENDLESS, "max_tokens": 40}}
    reference = await ask(engine, GENERATE, body)
    spread = engine.llm.spread_outputs
    # The watch over the load would set it back.
    monkeypatch.setattr(engine.llm, "spread_outputs", lambda interval: None)
    try:
        if whole_way:
            spread(8)
        run = engine.run(call(GENERATE, body), "salt")
        deltas = []
        tokens = None
        async for batch in run.batches():
            deltas += [event.delta for event in batch if hasattr(event, "delta")]
            if len(deltas) == 3 and not whole_way:
                spread(8)
        tokens = run.usage.completion_tokens
        await run.aclose()
    finally:
        spread(1)
        engine.llm.stream_interval = 1
    assert "".join(deltas) == reference.text
    assert tokens == 40
    assert len(deltas) <= 10
    (first, *_) = [
        event for batch in reference.batches for event in batch if hasattr(event, "delta")
    ]
    assert deltas[0] == first.delta
