"""When an engine counts as stuck: told by an engine of a few lines, with real time."""

import asyncio
import time

import pytest

from engine_watchdog import watch

pytestmark = pytest.mark.asyncio
STUCK_S = 0.4


class Subject:
    """An engine that answers unless it is told to be stuck, with or without work."""

    def __init__(self) -> None:
        self.steps = asyncio.Event()
        self.steps.set()
        self.busy = True
        self.asked = 0

    async def ask(self) -> None:
        self.asked += 1
        await self.steps.wait()


async def over_within(watching: asyncio.Task[None], timeout_s: float) -> bool:
    return bool((await asyncio.wait([watching], timeout=timeout_s))[0])


async def test_no_answer_with_work_waiting_is_stuck() -> None:
    subject = Subject()
    watching = asyncio.create_task(watch(subject.ask, lambda: subject.busy, STUCK_S))
    assert not await over_within(watching, 2 * STUCK_S)
    assert subject.asked > 2
    subject.steps.clear()
    began = time.monotonic()
    assert await over_within(watching, 20 * STUCK_S)
    assert time.monotonic() - began >= 0.9 * STUCK_S


async def test_an_idle_engine_is_not_asked_and_never_stuck() -> None:
    subject = Subject()
    subject.busy = False
    subject.steps.clear()
    watching = asyncio.create_task(watch(subject.ask, lambda: subject.busy, STUCK_S))
    assert not await over_within(watching, 2 * STUCK_S)
    assert subject.asked == 0
    watching.cancel()


async def test_an_answer_in_time_begins_the_count_anew() -> None:
    subject = Subject()
    watching = asyncio.create_task(watch(subject.ask, lambda: subject.busy, STUCK_S))
    for _ in range(5):
        subject.steps.clear()
        await asyncio.sleep(STUCK_S / 2)
        subject.steps.set()
        await asyncio.sleep(STUCK_S / 4)
    assert not watching.done()
    watching.cancel()


async def test_time_in_which_this_process_did_not_run_does_not_count() -> None:
    subject = Subject()
    watching = asyncio.create_task(watch(subject.ask, lambda: subject.busy, STUCK_S))
    await asyncio.sleep(STUCK_S / 4)
    subject.steps.clear()
    await asyncio.sleep(STUCK_S / 4)
    time.sleep(3 * STUCK_S)  # noqa: ASYNC251 - both were paused
    subject.steps.set()
    assert not await over_within(watching, STUCK_S)
    watching.cancel()


async def test_a_question_that_fails_is_no_silence() -> None:
    async def fail() -> None:
        raise ConnectionError

    watching = asyncio.create_task(watch(fail, lambda: True, STUCK_S))
    assert not await over_within(watching, 2 * STUCK_S)
    watching.cancel()
