"""Worker processes of the local platform: start, restart, stop, leave nothing behind.

Owns the processes; knows the platform only by what `Platform` names and nothing of jobs.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

log = logging.getLogger("local_runpod")

MAX_RESTARTS = 5
RESTART_DELAY_S = 1.0
HEALTHY_AFTER_S = 60.0
TERM_GRACE_S = 90.0


class Platform(Protocol):
    """What the processes need of the platform."""

    def worker_env(self, worker_id: str) -> dict[str, str]:
        """Return the variables that connect a process."""

    def drain(self, worker_id: str) -> None:
        """Give the worker no more jobs."""

    def lose(self, worker_id: str) -> None:
        """Take the worker as gone."""


async def run_workers(
    platform: Platform,
    command: Sequence[str],
    environment: Mapping[str, str],
    count: int,
    *,
    restart_delay_s: float = RESTART_DELAY_S,
) -> int:
    """Run `count` workers until SIGTERM, SIGINT or their own end; return the exit code.

    The code is 0 when every worker ended well, otherwise that of one that did not.
    Without a command it waits for a signal, for workers started elsewhere.
    """
    stop = asyncio.Event()
    hurry = asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        if not command:
            await stop.wait()
            return 0
        codes = await asyncio.gather(
            *(
                _keep_running(
                    platform, f"pod-{n}", command, environment, stop, hurry, restart_delay_s
                )
                for n in range(1, count + 1)
            )
        )
        return next((code for code in codes if code), 0)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _keep_running(
    platform: Platform,
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    stop: asyncio.Event,
    hurry: asyncio.Event,
    restart_delay_s: float,
) -> int:
    restarts = 0
    while True:
        # A new id each time: a restarted worker is another one to the platform.
        worker_id = f"{name}-{restarts}" if restarts else name
        started_s = time.monotonic()
        code = await _run_once(platform, worker_id, command, environment, stop, hurry)
        if code == 0 or stop.is_set():
            return code
        if time.monotonic() - started_s > HEALTHY_AFTER_S:
            restarts = 0
        if restarts == MAX_RESTARTS:
            log.error("worker %s keeps failing, giving up", worker_id)
            return code
        delay_s = restart_delay_s * 2**restarts
        restarts += 1
        log.warning("worker %s exited with %d, restarting in %.1f s", worker_id, code, delay_s)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), delay_s)
            return code


async def _run_once(
    platform: Platform,
    worker_id: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    stop: asyncio.Event,
    hurry: asyncio.Event,
) -> int:
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**environment, **platform.worker_env(worker_id)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
    )
    log.info("worker %s started, pid %d", worker_id, process.pid)
    ended = asyncio.create_task(process.wait())
    stopping = asyncio.create_task(stop.wait())
    hurrying = asyncio.create_task(hurry.wait())
    try:
        await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            platform.drain(worker_id)
            process.terminate()
            await asyncio.wait(
                {ended, hurrying}, timeout=TERM_GRACE_S, return_when=asyncio.FIRST_COMPLETED
            )
        return process.returncode if process.returncode is not None else 1
    finally:
        # The SDK's ping process and an engine process outlive a worker that was killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await ended
        stopping.cancel()
        hurrying.cancel()
        platform.lose(worker_id)
        log.info("worker %s ended", worker_id)
