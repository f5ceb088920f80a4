"""How a person ends the command: Ctrl-C, and the signals that end a process.

Owns their handlers. Work on an event loop is cancelled, everything else raises
`KeyboardInterrupt`; knows nothing of what is interrupted.
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar, cast

T = TypeVar("T")


def listen() -> None:
    """Take SIGTERM and SIGHUP for Ctrl-C: whoever ends this process wants its job ended too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup makes it
            signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell makes it in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run the work on an event loop of its own.

    Raises:
        KeyboardInterrupt: interrupted; the work was cancelled first. A second interrupt does
            not wait for what the work does about that.
    """
    with asyncio.Runner() as runner:
        return run_in(runner, work)


def run_in(runner: asyncio.Runner, work: Coroutine[Any, Any, T]) -> T:
    """Run the work on the runner's loop, which may run more afterwards; raises what `run` does."""
    interrupted = False

    async def interruptible() -> T:
        task = cast("asyncio.Task[T]", asyncio.current_task())

        def interrupt() -> None:
            nonlocal interrupted
            if interrupted:
                raise KeyboardInterrupt
            interrupted = True
            task.cancel()

        with _calling(interrupt):
            return await work

    try:
        return runner.run(interruptible())
    except asyncio.CancelledError:
        if interrupted:
            raise KeyboardInterrupt from None
        raise


@contextlib.contextmanager
def _calling(interrupt: Callable[[], None]) -> Iterator[None]:
    """Have the running loop call this on every signal that is not ignored.

    asyncio's own handler of SIGINT cancels amid whatever code runs: a future that was just
    found pending may be cancelled before its result is set, which then fails. A loop's
    handlers are called between its callbacks.
    """
    loop = asyncio.get_running_loop()
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }
    for number in before:
        loop.add_signal_handler(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
