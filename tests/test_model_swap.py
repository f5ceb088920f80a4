"""Turns, notes and failures of a worker that exchanges its model, on engines that do as told.

Real engines are exchanged in test_worker_swap; here each load, answer and death comes when the
test says so.
"""

import asyncio
import contextlib
import gc
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from base_models import BaseModel, clashes
from errors import ConfigError, EngineDead, RequestError
from frames import AnswerEvent, Body, End, Head, Note, Text
from model_swap import Models
from protocol import GENERATE, Call

CHAT = "/v1/chat/completions"


class Peer:
    """What stands in for vLLM: says its model's name, when it is let."""

    max_concurrency = 16
    routes: tuple[str, ...] = (CHAT, "/v1/models")

    def __init__(self, house: "House", name: str) -> None:
        self.house = house
        self.name = name
        self.dead = False
        self.runs: set[PeerRun] = set()
        assert house.alive is None, f"{name} is built beside {house.alive}"
        house.alive = name
        house.journal.append(f"build {name}")

    def about(self) -> dict[str, Any]:
        return {"models": [self.name], "tasks": ["generate"]}

    async def start(self, timed: Any = None) -> None:
        if self.name in self.house.unstartable:
            raise ConfigError(["the engine cannot answer"])
        if self.name in self.house.dying:
            self.dead = True
            await asyncio.Event().wait()

    def run(self, call: Call, cache_salt: str) -> "PeerRun":
        return PeerRun(self, call)

    async def stop(self) -> None:
        assert not self.runs, f"{self.name} is stopped while it answers"
        self.house.journal.append(f"stop {self.name}")
        self.house.alive = None


class PeerRun:
    def __init__(self, engine: Peer, call: Call) -> None:
        self.engine = engine
        self.call = call
        self.usage = SimpleNamespace(started=0.0)

    async def batches(self) -> AsyncIterator[list[AnswerEvent]]:
        if self.call.route == "/v1/models":
            entry = {"id": self.engine.name, "object": "model", "created": 1, "owned_by": "vllm"}
            yield [Head(200, "body", ""), Body(json.dumps({"data": [entry]}).encode())]
            return
        label = json.loads(self.call.body).get("label", "") if self.call.body[:1] == b"{" else "?"
        self.engine.runs.add(self)
        self.engine.house.journal.append(f"{self.engine.name} {label}")
        yield [Head(200, "generate", "")]
        await self.engine.house.open.wait()
        if self.engine.dead:
            raise EngineDead
        yield [Text(0, self.engine.name), End(None, {})]

    async def aclose(self) -> None:
        self.engine.runs.discard(self)


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> Iterator[None]:
    """Spare each swap's collection the walk through everything that other tests have imported."""
    with pytest.MonkeyPatch.context() as patch:
        gc.freeze()
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()


class House:
    """Several models and what happens to them; answers and loads wait until they may go on."""

    def __init__(self, *names: str, may_swap: bool = True, **options: float) -> None:
        self.journal: list[str] = []
        self.tried: list[str] = []
        self.alive: str | None = None
        self.unstartable: set[str] = set()
        self.unbuildable: set[str] = set()
        self.dying: set[str] = set()
        self.loads = threading.Event()
        self.loads.set()
        self.open = asyncio.Event()
        self.engines: list[Peer] = []
        self.bases = [BaseModel((name, f"{name}-also"), self._builder(name)) for name in names]
        first = self.bases[0].build()
        options = {"linger_s": 0.0, **options}
        self.models = Models(self.bases, first, may_swap=may_swap, **options)

    def _builder(self, name: str) -> Callable[[], Peer]:
        def build() -> Peer:
            assert self.loads.wait(10)
            self.tried.append(name)
            if name in self.unbuildable:
                raise ConfigError([f"{name} does not fit"])
            self.engines.append(Peer(self, name))
            return self.engines[-1]

        return build

    async def ask(self, model: str | None, label: str = "", **options: Any) -> "Asked":
        """Begin a call and let it come as far as it does by itself."""
        body = {"label": label} | ({} if model is None else {"model": model})
        return await self.send(Call(GENERATE, "POST", json.dumps(body).encode()), **options)

    async def send(self, call: Call, **options: Any) -> "Asked":
        asked = Asked(self.models, call, options)
        await settle()
        return asked


class Asked:
    """A call as the handler makes it: a task that reads, and closes at its end."""

    def __init__(self, models: Models, call: Call, options: dict[str, Any]) -> None:
        self.notes: list[str] = []
        self.begun = False
        self.task = asyncio.create_task(self._read(models, call, options))

    async def _read(self, models: Models, call: Call, options: dict[str, Any]) -> str:
        run = models.run(call, "salt", **options)
        text = ""
        try:
            async for batch in run.batches():
                for event in batch:
                    match event:
                        case Note(words):
                            self.notes.append(words)
                        case Text(_, delta):
                            text += delta
                        case Body(data):
                            text += data.decode()
                        case Head():
                            self.begun = True
        finally:
            await run.aclose()
        return text

    async def text(self) -> str:
        return await asyncio.wait_for(self.task, 10)

    async def error(self) -> RequestError:
        with pytest.raises(RequestError) as caught:
            await self.text()
        return caught.value

    async def cancel(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


async def settle() -> None:
    """Let everything run that can without another thread or a clock."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)


@pytest.fixture
async def house() -> House:
    house = House("a", "b", "c")
    await house.models.start()
    house.journal.clear()
    return house


async def test_calls_for_the_loaded_model_never_wait(house: House) -> None:
    asked = [await house.ask(name, "1") for name in ("a", "a-also", None, "")]
    assert house.journal == ["a 1"] * 4
    house.open.set()
    assert [await each.text() for each in asked] == ["a"] * 4
    assert [each.notes for each in asked] == [[]] * 4


async def test_running_calls_end_before_the_engine_does_and_later_ones_wait(house: House) -> None:
    running = await house.ask("a", "running")
    other = await house.ask("b", "other")
    later = await house.ask("a", "later")
    assert house.journal == ["a running"]
    assert other.notes == ["waiting for model b while the worker finishes with another one"]
    house.loads.clear()
    house.open.set()
    assert await running.text() == "a"
    await until(lambda: other.notes[-1] == later.notes[-1] == "loading model b")
    house.loads.set()
    assert await other.text() == "b"
    assert await later.text() == "a"
    assert house.journal == [
        "a running", "stop a", "build b", "b other", "stop b", "build a", "a later",
    ]  # fmt: skip


async def test_calls_for_no_model_wait_as_others_do(house: House) -> None:
    version = Call("/version", "GET", b"")
    running = await house.send(version)
    other = await house.ask("b", "other")
    later = await house.send(version)
    assert house.journal == ["a ?"]
    house.open.set()
    assert await running.text() == "a"
    assert await other.text() == "b"
    assert await later.text() == "b"


async def test_all_that_waits_for_a_model_is_admitted_when_it_is_loaded(house: House) -> None:
    house.loads.clear()
    asked = [await house.ask("b", str(number)) for number in range(3)]
    asked += [await house.ask("a", "back")]
    house.loads.set()
    await until(lambda: len(house.journal) == 5)
    assert house.journal == ["stop a", "build b", "b 0", "b 1", "b 2"]
    house.open.set()
    assert [await each.text() for each in asked] == ["b", "b", "b", "a"]


async def test_the_model_whose_call_has_waited_longest_is_next(house: House) -> None:
    running = await house.ask("a")
    asked = [await house.ask(name, name) for name in ("c", "b", "c", "a")]
    house.open.set()
    assert await running.text() == "a"
    assert [await each.text() for each in asked] == ["c", "b", "c", "a"]
    assert [line for line in house.journal if "build" in line] == ["build c", "build b", "build a"]


async def test_nobody_is_kept_waiting_by_a_model_that_is_always_asked_for(house: House) -> None:
    house.open.set()
    stopped = False

    async def insist(name: str) -> int:
        answers = 0
        while not stopped:
            calls = [await house.ask(name) for _ in range(2)]
            for call in calls:
                assert await call.text() == name
                answers += 1
        return answers

    insistent = [asyncio.create_task(insist(name)) for name in ("a", "b")]
    for _ in range(5):
        assert await (await house.ask("c")).text() == "c"
    stopped = True
    assert min(await asyncio.wait_for(asyncio.gather(*insistent), 10)) >= 5


async def test_a_turn_is_as_long_as_the_load(house: House) -> None:
    house.loads.clear()
    first = await house.ask("b", "first")
    back = await house.ask("a", "back")
    load_s = 0.3
    await asyncio.sleep(load_s)
    house.loads.set()
    await until(lambda: first.begun)
    loaded_s = time.monotonic()
    within = await house.ask("b", "within")
    assert within.begun and not back.begun
    await asyncio.sleep(2 * load_s)
    after = await house.ask("b", "after")
    assert not after.begun
    house.open.set()
    assert await back.text() == "a"
    assert time.monotonic() - loaded_s >= load_s
    assert await after.text() == "b"
    assert house.journal.index("a back") < house.journal.index("b after")


async def test_callers_that_ask_again_at_once_are_kept_together() -> None:
    house = House("a", "b", linger_s=1)
    await house.models.start()
    house.open.set()
    house.loads.clear()
    first = await house.ask("b")
    back = await house.ask("a")
    await asyncio.sleep(5)  # a turn is as long as the loading took
    house.loads.set()
    assert await first.text() == "b"
    for _ in range(5):
        assert await (await house.ask("b")).text() == "b"
        await asyncio.sleep(0.02)
    assert not back.begun
    asked_s = time.monotonic()
    assert await back.text() == "a"
    # Nobody asks for b any more: the rest of its turn is given up.
    assert time.monotonic() - asked_s < 4
    assert house.journal.count("build a") == 2


@pytest.mark.parametrize("loading", [False, True])
async def test_who_is_cancelled_leaves_the_queue(house: House, loading: bool) -> None:
    running = await house.ask("a")
    if loading:
        house.loads.clear()
        house.open.set()
        assert await running.text() == "a"
    other = await house.ask("b")
    await other.cancel()
    again = await house.ask("a", "again")
    house.loads.set()
    house.open.set()
    assert await again.text() == "a"
    if loading:
        assert house.journal == ["a ", "stop a", "build b", "stop b", "build a", "a again"]
    else:
        assert house.journal == ["a ", "a again"]


async def test_a_call_expires_while_it_waits(house: House) -> None:
    running = await house.ask("a")
    other = await house.ask("b", expires_at=time.time() + 0.1)
    error = await other.error()
    assert (error.status, error.code) == (408, "expired")
    house.open.set()
    assert await running.text() == "a"
    await settle()
    assert house.alive == "a"


async def test_who_waits_is_told_so_again_and_again() -> None:
    house = House("a", "b", note_every_s=0.05)
    await house.models.start()
    await house.ask("a")
    other = await house.ask("b")
    await until(lambda: len(other.notes) >= 3)
    assert len(set(other.notes)) == 1
    await other.cancel()


@pytest.mark.parametrize(
    ("fault", "words"),
    [("unbuildable", "does not fit"), ("unstartable", "cannot answer"), ("dying", "died")],
)
async def test_a_model_that_fails_gives_way_to_the_one_before(
    house: House, fault: str, words: str
) -> None:
    getattr(house, fault).add("b")
    running = await house.ask("a")
    wrong = [await house.ask("b") for _ in range(3)]
    right = await house.ask("a", "right")
    third = await house.ask("c")
    house.open.set()
    assert await running.text() == "a"
    for each in wrong:
        error = await each.error()
        assert (error.status, error.code) == (503, "model_not_loadable")
        assert words in str(error)
    assert await right.text() == "a"
    assert await third.text() == "c"
    again = await (await house.ask("b")).error()
    assert again.code == "model_not_loadable"
    assert house.tried.count("b") == 1
    assert "b" not in str(house.models.about()["swappable"])
    assert not house.models.dead


async def test_without_any_model_the_worker_is_dead(house: House) -> None:
    house.unbuildable |= {"a", "b"}
    wrong, waiting = await house.ask("b"), await house.ask("a")
    assert (await wrong.error()).code in ("model_not_loadable", "engine_dead")
    assert (await waiting.error()).code == "engine_dead"
    assert house.models.dead
    assert (await (await house.ask("c")).error()).code == "engine_dead"
    assert house.models.about()["models"] == []


async def test_death_of_the_engine_is_told_to_those_who_wait(house: House) -> None:
    running, waiting = await house.ask("a"), await house.ask("b")
    house.engines[-1].dead = True
    assert house.models.dead
    house.open.set()
    assert (await running.error()).code == "engine_dead"
    assert (await waiting.error()).code == "engine_dead"
    assert "build b" not in house.journal


async def test_the_loop_goes_on_while_a_model_is_loaded(house: House) -> None:
    house.loads.clear()
    other = await house.ask("b")
    await until(lambda: "stop a" in house.journal)
    about = house.models.about()
    assert (about["models"], about["loading"]) == ([], "b")
    listing = await (await house.send(Call("/v1/models", "GET", b""))).text()
    assert {entry["loaded"] for entry in json.loads(listing)["data"]} == {False}
    await asyncio.wait_for(house.models.stop(), 1)
    house.loads.set()
    await other.cancel()


async def test_the_list_of_models_marks_the_loaded_one(house: House) -> None:
    listing = await (await house.send(Call("/v1/models", "GET", b""))).text()
    assert [(entry["id"], entry["loaded"]) for entry in json.loads(listing)["data"]] == [
        ("a", True), ("b", False), ("b-also", False), ("c", False), ("c-also", False),
    ]  # fmt: skip
    about = house.models.about()
    assert about["models"] == ["a"]
    assert about["swappable"] == ["b", "b-also", "c", "c-also"]


@pytest.mark.parametrize("body", [b"{", b"", b'{"model": 5}', b"\xff", b"[]", b"[" * 5000])
async def test_what_cannot_be_read_is_refused_by_whichever_engine_is_there(
    house: House, body: bytes
) -> None:
    house.open.set()
    assert await (await house.ask("b")).text() == "b"
    with contextlib.suppress(ValueError, AttributeError):
        assert await (await house.send(Call(CHAT, "POST", body))).text() == "b"
    assert house.alive == "b"


async def test_an_unlisted_model_is_refused_with_what_there_is(house: House) -> None:
    error = await (await house.ask("d")).error()
    assert (error.status, error.param) == (404, "model")
    for name in ("'d'", "a, a-also", "b, b-also, c"):
        assert name in str(error)


async def test_without_swapping_the_error_says_what_to_do() -> None:
    house = House("a", "b", may_swap=False)
    await house.models.start()
    house.open.set()
    error = await (await house.ask("b")).error()
    assert error.status == 404
    assert "it serves a, a-also" in str(error) and "MODEL_SWAP=true" in str(error)
    assert "d" in str(await (await house.ask("d")).error())
    assert await (await house.ask("a")).text() == "a"
    assert "swappable" not in house.models.about()


async def test_a_single_model_is_asked_everything_unread() -> None:
    house = House("a")
    await house.models.start()
    house.open.set()
    assert await (await house.ask("whatever")).text() == "a"
    assert house.models.about() == house.engines[0].about()


def test_models_of_one_name_are_refused() -> None:
    a, b = (BaseModel(names, lambda: pytest.fail()) for names in (("x", "y"), ("y",)))
    assert clashes([a]) == []
    (fault,) = clashes([a, b])
    assert "called y" in fault


@pytest.mark.parametrize("seed", range(10))
async def test_whatever_is_asked_and_cancelled_is_answered_by_its_model(seed: int) -> None:
    chance = random.Random(seed)
    house = House("a", "b", "c", linger_s=0.001)
    await house.models.start()
    house.open.set()

    async def one() -> None:
        await asyncio.sleep(chance.random() / 5)
        name = chance.choice("abc")
        asked = await house.ask(name)
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() / 50)
            await asked.cancel()
        else:
            assert await asked.text() == name

    await asyncio.wait_for(asyncio.gather(*(one() for _ in range(150))), 20)
    assert house.alive and not house.models.dead
