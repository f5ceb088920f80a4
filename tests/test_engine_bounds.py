"""What one client asks for does not stop another one's tokens; what waits too long is refused.

`make attack` starts a second, weakened engine, with vLLM's own defaults, on which the same shows
what would happen. What stops the engine comes last.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from errors import EngineDead, RequestError
from protocol import GENERATE
from request_bounds import default_max_choices
from tests.claims import FULL, Trials
from tests.engines import (
    CHAT,
    TINY,
    Answer,
    Engine,
    Run,
    build,
    call,
    eventually,
    generate,
    idle,
    read,
    started,
    user,
)

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

SEATS = 4
OPTIONS = {
    "MAX_MODEL_LEN": "131072",
    "MAX_NUM_SEQS": str(SEATS),
    "MAX_NUM_BATCHED_TOKENS": "512",
    "ENABLE_PREFIX_CACHING": "false",
}
# A CPU takes minutes to read 100,000 tokens, and what is shown is the same.
LONG_TOKENS = 100_000 if FULL else 16_000
LONG = [1000 + number % 1000 for number in range(LONG_TOKENS)]


def build_for_long_prompts(**options: str) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        return build(TINY, "tiny", **OPTIONS, **options)


@pytest.fixture(scope="module")
def built() -> Engine:
    return build_for_long_prompts()


@pytest.fixture(scope="module")
def built_weak() -> Engine | None:
    return build_for_long_prompts(LONG_PREFILL_TOKEN_THRESHOLD="0") if FULL else None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(built: Engine, built_weak: Engine | None) -> AsyncIterator[Engine]:
    async with started(built) as engine:
        yield engine


class Asked:
    """A run of the `generate` route that is read in the background."""

    def __init__(self, engine: Engine, prompt: object, **params: object) -> None:
        params = {"temperature": 0, "ignore_eos": True, **params}
        body = {"prompt": prompt, "sampling_params": params}
        self.run: Run = engine.run(call(GENERATE, body), "salt")
        self.answer: asyncio.Task[Answer] = asyncio.create_task(read(self.run))

    async def inside(self) -> None:
        """Wait until the engine has it."""
        assert await eventually(lambda: self.run.usage.accepted is not None)

    async def begun(self) -> None:
        """Wait for its first token, or for its end."""
        usage = self.run.usage
        assert await eventually(lambda: bool(usage.first_token) or self.answer.done(), 300)
        assert usage.first_token, self.answer.exception()

    async def close(self) -> None:
        await self.run.aclose()
        with contextlib.suppress(RequestError):
            await self.answer


async def overtakes(engine: Engine) -> tuple[bool, int]:
    """Send a very long prompt, then a short one; return whether that is answered first.

    And how many tokens a stream got meanwhile that had begun before both.
    """
    stream = Asked(engine, "Hello", max_tokens=20_000)
    await stream.begun()
    before = stream.run.usage.completion_tokens
    long = Asked(engine, LONG, max_tokens=1)
    await long.inside()
    short = await generate(engine, prompt="Hello there", max_tokens=8, ignore_eos=True)
    assert short.usage["completion_tokens"] == 8
    first = long.run.usage.first_token is None
    got = stream.run.usage.completion_tokens - before
    await long.close()
    await stream.close()
    assert await eventually(lambda: idle(engine))
    return first, got


@pytest.mark.skipif(not FULL, reason="starts an engine of its own: make attack")
@pytest.mark.claim("bounds.prompt")
async def test_by_its_defaults_vllm_answers_a_very_long_prompt_first(
    built_weak: Engine, engine: Engine
) -> None:
    async with started(built_weak) as weak:
        first, got = await overtakes(weak)
    assert not first
    assert got >= 0.8 * LONG_TOKENS / 512  # one per step: that one vLLM itself looks after


@pytest.mark.claim(
    "bounds.prompt", "A very long prompt of one client does not stop the tokens of others."
)
async def test_a_very_long_prompt_stops_nobody(engine: Engine, claim: Trials) -> None:
    first, got = await overtakes(engine)
    assert first
    assert got >= 8
    claim.detail(f"{LONG_TOKENS:,} tokens, {got} of another stream meanwhile")


@pytest.mark.claim(
    "bounds.choices", "As many answers as one request may ask for leave seats to other requests."
)
async def test_many_choices_leave_seats_to_others(engine: Engine) -> None:
    async def waits_for_a_seat(n: int) -> bool:
        many = Asked(engine, "Hello", n=n, max_tokens=150, temperature=1)
        await many.begun()
        await generate(engine, prompt="Hello there", max_tokens=8, ignore_eos=True)
        tokens = many.run.usage.completion_tokens
        await many.close()
        return tokens >= SEATS * 150

    assert await waits_for_a_seat(2 * SEATS)
    assert not await waits_for_a_seat(default_max_choices(SEATS))


@pytest.mark.claim(
    "bounds.queue", "What waits longer than MAX_QUEUE_S is refused with the number, nothing else."
)
class TestTheQueue:
    @pytest.mark.parametrize(
        ("route", "more"),
        [
            (GENERATE, {"sampling_params": {"max_tokens": 4}}),
            (GENERATE, {"sampling_params": {"max_tokens": 4}, "stream": False}),
            (CHAT, {"max_completion_tokens": 4, "stream": True}),
            (CHAT, {"max_completion_tokens": 4, "stream": False}),
        ],
    )
    async def test_waiting_too_long_is_refused_with_the_number(
        self, engine: Engine, route: str, more: dict[str, object]
    ) -> None:
        seated = [Asked(engine, "Hello", max_tokens=20_000) for _ in range(SEATS)]
        for asked in seated:
            await asked.begun()
        body = {"messages": user("Hello"), **more}
        try:
            engine.max_queue_s = 0
            patient = asyncio.create_task(read(engine.run(call(route, body), "salt")))
            await asyncio.sleep(0)  # it begins, without a limit
            engine.max_queue_s = 0.5
            with pytest.raises(RequestError) as caught:
                await read(engine.run(call(route, body), "salt"))
            assert (caught.value.status, caught.value.code) == (503, "queue_too_long")
            assert "0.5 s" in caught.value.message
            assert "MAX_QUEUE_S" in caught.value.message
            assert not patient.done()
            assert not any(asked.answer.done() for asked in seated)
        finally:
            engine.max_queue_s = 0
            for asked in seated:
                await asked.close()
        assert (await patient).status == 200
        assert await eventually(lambda: idle(engine))

    async def test_what_has_begun_may_take_longer(self, engine: Engine) -> None:
        engine.max_queue_s = 2
        body = {"max_completion_tokens": 1_500, "ignore_eos": True, "stream": False}
        chat = {"messages": user("Hello"), **body}
        try:
            answer = await read(engine.run(call(CHAT, chat), "salt"))
        finally:
            engine.max_queue_s = 0
        assert answer.status == 200
        assert answer.end is not None
        assert answer.end.timings["total_ms"] > 2000


@pytest.mark.claim(
    "bounds.stuck", "A worker whose engine takes no step while work waits says so, and ends."
)
async def test_an_engine_that_is_stopped_counts_as_dead(engine: Engine) -> None:
    """And one that is only busy with a very long prompt does not."""
    (core,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if process.pid in core_pids(engine)
    )
    engine._stuck_s = 3
    watch = asyncio.create_task(engine._watch_steps())
    await asyncio.sleep(0)
    long = Asked(engine, LONG, max_tokens=1)
    await long.begun()
    await long.close()
    assert not engine.dead
    core.send_signal(signal.SIGSTOP)
    try:
        assert not await eventually(lambda: engine.dead, 4)  # nobody waits for it
        asked = Asked(engine, "Hello", max_tokens=8)
        with pytest.raises(EngineDead):
            await asked.answer
        with pytest.raises(EngineDead):
            await generate(engine, prompt="Hello")
        assert engine.dead
        assert watch.done()
    finally:
        core.send_signal(signal.SIGCONT)


def core_pids(engine: Engine) -> set[int]:
    return {process.pid for process in engine.llm.engine_core.resources.engine_manager.processes}
