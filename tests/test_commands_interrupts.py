"""Interrupts of the command: work is cancelled where nothing breaks, and handlers are put back."""

import asyncio
import signal
from typing import Any

import pytest

import commands_interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Complaints(list[str]):
    """What the running loop's callbacks failed with."""

    def listen(self) -> None:
        asyncio.get_running_loop().set_exception_handler(self._note)

    def _note(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.append(context["message"])


async def interrupted_amid_a_callback(complaints: Complaints) -> None:
    """Wait for what a callback settles that a signal reaches before its last line."""
    complaints.listen()
    loop = asyncio.get_running_loop()
    pending: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        assert not pending.done()
        signal.raise_signal(signal.SIGINT)
        pending.set_result(None)

    loop.call_soon(settle)
    await pending
    await loop.create_future()


def test_no_callback_is_cut_in_two() -> None:
    complaints = Complaints()
    with pytest.raises(KeyboardInterrupt):
        commands_interrupts.run(interrupted_amid_a_callback(complaints))
    assert complaints == []


def test_asyncio_alone_cuts_it_in_two() -> None:
    complaints = Complaints()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(interrupted_amid_a_callback(complaints))
    assert complaints and "settle" in complaints[0]


@pytest.mark.parametrize("number", SIGNALS)
def test_work_ends_before_the_interrupt_is_told_and_the_handlers_are_as_before(number: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    ended = []

    async def work() -> None:
        signal.raise_signal(number)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        commands_interrupts.run(work())
    assert ended == [number]
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_second_interrupt_does_not_wait_for_the_end_of_the_work() -> None:
    waited = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        signal.raise_signal(signal.SIGINT)
        try:
            await loop.create_future()
        finally:
            signal.raise_signal(signal.SIGINT)
            await loop.create_future()
            waited.append("to its end")

    with pytest.raises(KeyboardInterrupt):
        commands_interrupts.run(work())
    assert waited == []


def test_a_loop_runs_more_after_an_interrupt() -> None:
    async def hang() -> None:
        signal.raise_signal(signal.SIGINT)
        await asyncio.get_running_loop().create_future()

    with asyncio.Runner() as runner:
        with pytest.raises(KeyboardInterrupt):
            commands_interrupts.run_in(runner, hang())
        assert commands_interrupts.run_in(runner, asyncio.sleep(0, "more")) == "more"


def test_a_cancellation_of_its_own_is_no_interrupt() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        commands_interrupts.run(work())


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:

        async def work() -> str:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(0)
            return "to its end"

        assert commands_interrupts.run(work()) == "to its end"
    finally:
        signal.signal(signal.SIGINT, before)
