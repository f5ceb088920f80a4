"""Worker processes of the local platform: start, restart, stop, leave nothing behind.

Owns the processes; knows the platform only by what `Platform` names, and nothing of jobs.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

log = logging.getLogger("local_runpod")

_PR_SET_PDEATHSIG = 1


class Platform(Protocol):
    """What the processes need of the platform."""

    def worker_env(self, worker_id: str) -> dict[str, str]:
        """Return the variables that connect a process."""

    def drain(self, worker_id: str) -> None:
        """Give the worker no more jobs."""

    def lose(self, worker_id: str) -> None:
        """Take the worker as gone."""


@dataclass(kw_only=True)
class Workers:
    """`count` processes of one command that serve the platform.

    One that fails is started again up to `restarts` times, after `restart_delay_s`,
    then twice that, and so on; one that ends with 0 is not. `stop` drains all of them
    and sends SIGTERM; they have `grace_s` to finish their jobs.
    """

    platform: Platform
    command: Sequence[str]
    environment: Mapping[str, str]
    count: int = 1
    restarts: int = 3
    restart_delay_s: float = 1.0
    grace_s: float = 90.0
    _stop: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _hurry: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def run(self) -> int:
        """Run until `stop` or the workers' own end; return 0 or a failed one's exit code.

        Without a command it waits for `stop` alone, for workers started elsewhere.
        """
        if not self.command:
            await self._stop.wait()
            return 0
        names = [f"pod-{n}" for n in range(1, self.count + 1)]
        codes = await asyncio.gather(*map(self._keep_running, names))
        return next((code for code in codes if code), 0)

    def stop(self) -> None:
        """Let the workers finish their jobs and end; at the second call, end them at once."""
        if self._stop.is_set():
            log.info("ending the workers at once")
            self._hurry.set()
        else:
            log.info("the workers finish their jobs and end; once more ends them at once")
            self._stop.set()

    async def _keep_running(self, name: str) -> int:
        for restart in range(self.restarts + 1):
            # A worker that was restarted is another one to the platform.
            worker_id = f"{name}-{restart}" if restart else name
            code = await self._run_once(worker_id)
            if code == 0 or self._stop.is_set() or restart == self.restarts:
                break
            delay_s = self.restart_delay_s * 2**restart
            log.warning("worker %s failed, restarting in %.1f s", worker_id, delay_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay_s)
                break
        return code

    async def _run_once(self, worker_id: str) -> int:
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command,
                env={**self.environment, **self.platform.worker_env(worker_id)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            log.error("worker %s cannot be started: %s", worker_id, error)
            self.platform.lose(worker_id)
            return 127
        log.info("worker %s started, pid %d", worker_id, process.pid)
        ended = asyncio.create_task(process.wait())
        stop = asyncio.create_task(self._stop.wait())
        hurry = asyncio.create_task(self._hurry.wait())
        try:
            await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
            stopped = not ended.done()
            if stopped:
                self.platform.drain(worker_id)
                process.terminate()
                await asyncio.wait(
                    {ended, hurry}, timeout=self.grace_s, return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            stop.cancel()
            hurry.cancel()
            # The SDK's ping process and an engine's processes outlive a worker that was killed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = await ended
            self.platform.lose(worker_id)
            log.info("worker %s ended with code %d", worker_id, code)
        if stopped and code == -signal.SIGTERM:
            return 0
        return code if code >= 0 else 128 - code


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
