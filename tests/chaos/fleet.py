"""The workers of a run: two that are kept alive, whatever is done to them.

Owns starting, replacing and ending them, each with a clock of its own, and what they leave
behind. Knows nothing of jobs.
"""

import asyncio
import contextlib
import mmap
import os
import signal
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from local_runpod import LocalRunpod
from tests.chaos import meter
from tests.workers import RunningWorker

HOOKS = Path(__file__).with_name("hooks")
START_S = 300.0
END_S = 90.0
QUIET_CPU = 0.2
"""Share of a core above which a worker is not idle."""


class Clock:
    """The clock of one worker; `path` is what its process reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)

    def set(self, offset_s: float) -> None:
        """Set the clock to so many seconds from the machine's."""
        self._memory[:8] = struct.pack("<d", offset_s)


@dataclass(eq=False)
class Member:
    """One worker of the fleet."""

    worker: RunningWorker
    clock: Clock
    probe: Path
    expected: str = ""
    """What ends it, if something is about to."""

    @property
    def name(self) -> str:
        """Its id on the platform."""
        return self.worker.name


@dataclass(frozen=True)
class Ended:
    """How a worker ended."""

    name: str
    cause: str
    code: int
    processes_left: int
    memory_left: int
    """Files in shared memory that nobody has any more."""
    jobs_left: int
    """Jobs that the platform still took for its own, and that it did not answer by its log.

    An end that it posted and that the platform has forgotten is not the worker's fault.
    """


Start = Callable[[str, dict[str, str]], RunningWorker]


def answered(log: str, job_id: str) -> bool:
    """Whether a worker's log tells of the end of a job, and not that it was given up."""
    ends = [line for line in log.splitlines() if f" worker: job={job_id} " in line]
    return bool(ends) and " outcome=cancelled" not in ends[-1]


@dataclass(eq=False)
class Fleet:
    """`count` workers of a platform; `start` makes one of a name and variables."""

    platform: LocalRunpod
    folder: Path
    start: Start
    count: int = 2
    members: dict[str, Member] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)
    _number: int = 0
    _keeper: asyncio.Task[None] | None = None
    _shared: dict[str, set[str]] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def running(self) -> "AsyncIterator[Fleet]":
        """Keep the fleet for as long as this is open, and leave no process of it."""
        self._keeper = asyncio.create_task(self._keep())
        try:
            await self.complete()
            yield self
        finally:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
            for member in self.members.values():
                member.worker.kill()

    def _add(self) -> Member:
        self._number += 1
        name = f"pod-{self._number}"
        clock = Clock(self.folder / f"{name}.clock")
        probe = self.folder / f"{name}.tasks"
        hooks = {
            "PYTHONPATH": str(HOOKS),
            "CHAOS_CLOCK": str(clock.path),
            "CHAOS_PROBE": str(probe),
        }
        member = self.members[name] = Member(self.start(name, hooks), clock, probe)
        return member

    async def _keep(self) -> None:
        while True:
            for member in list(self.members.values()):
                if member.worker.process.poll() is not None:
                    await self._bury(member)
            while sum(not member.expected for member in self.members.values()) < self.count:
                self._add()
            await asyncio.sleep(0.1)

    async def _bury(self, member: Member) -> None:
        known = self.platform.workers.get(member.name)
        log = member.worker.log
        jobs = sum(not answered(log, job_id) for job_id in known.jobs) if known else 0
        self.platform.lose(member.name)
        del self.members[member.name]
        left = await self._until_gone(member)
        shared = [path for path in self._shared.pop(member.name, ()) if os.path.exists(path)]  # noqa: ASYNC240 - in memory
        code = member.worker.process.returncode
        self.ended.append(Ended(member.name, member.expected, code, left, len(shared), jobs))

    async def _until_gone(self, member: Member) -> int:
        until_s = time.monotonic() + 10
        while left := await asyncio.to_thread(member.worker.processes):
            if time.monotonic() > until_s:
                break
            await asyncio.sleep(0.1)
        return len(left)

    def ready(self) -> list[Member]:
        """Return the workers that take jobs and that nothing is about to end."""
        return [
            member
            for member in self.members.values()
            if not member.expected and self.platform.workers[member.name].ready
        ]

    @property
    def whole(self) -> bool:
        """Whether as many workers as there should be take jobs, what is about to end included."""
        workers = self.platform.workers
        return sum(name in workers and workers[name].ready for name in self.members) >= self.count

    async def complete(self, keeping: int | None = None) -> None:
        """Wait until all workers are ready."""
        until_s = time.monotonic() + START_S
        while len(self.ready()) < (keeping or self.count):
            if self._keeper and self._keeper.done():
                self._keeper.result()
            if time.monotonic() > until_s or len(self.ended) > 20:
                logs = [member.worker.log[-2000:] for member in self.members.values()]
                raise AssertionError("the fleet is not complete:\n" + "\n".join(logs))
            await asyncio.sleep(0.1)
        for member in self.members.values():
            if member.name not in self._shared:
                self._shared[member.name] = await asyncio.to_thread(member.worker.shared_memory)

    # -- what happens to it ------------------------------------------------------------------

    async def kill(self, member: Member) -> None:
        """Kill a worker's process, and it alone."""
        member.expected = "SIGKILL"
        member.worker.process.kill()
        await self._until_buried(member)

    async def kill_engine(self, member: Member) -> None:
        """Kill the process of a worker's engine."""
        member.expected = "engine killed"
        await asyncio.to_thread(member.worker.kill_child)
        await self._until_buried(member)

    async def roll(self, member: Member, *, drained: bool) -> None:
        """Send SIGTERM to a worker; `drained` says that the platform gives it no job from here."""
        member.expected = "SIGTERM"
        if drained:
            self.platform.drain(member.name)
        member.worker.process.send_signal(signal.SIGTERM)
        await self._until_buried(member)

    async def _until_buried(self, member: Member) -> None:
        until_s = time.monotonic() + END_S
        while member.name in self.members:
            if time.monotonic() > until_s:
                member.expected += ", but it did not end"
                os.killpg(member.worker.process.pid, signal.SIGKILL)
                until_s += END_S
            await asyncio.sleep(0.05)

    async def end(self) -> None:
        """End all workers as an endpoint that is scaled to nothing does."""
        self.count = 0
        await asyncio.gather(
            *(self.roll(member, drained=True) for member in list(self.members.values()))
        )

    # -- measures ----------------------------------------------------------------------------

    async def memory_bytes(self) -> int:
        """Return the memory of all workers."""
        return await asyncio.to_thread(
            lambda: sum(meter.memory_bytes(m.worker.processes()) for m in self.members.values())
        )

    async def busy(self, within_s: float = 15.0) -> list[str]:
        """Return the workers that still work after `within_s` without a job.

        An engine that has a request left has no pause, one that has none uses no CPU.
        """
        until_s = time.monotonic() + within_s
        while True:
            before = await asyncio.to_thread(self._cpu_s)
            await asyncio.sleep(1)
            after = await asyncio.to_thread(self._cpu_s)
            busy = [name for name in before if after.get(name, 0) - before[name] > QUIET_CPU]
            if not busy or time.monotonic() > until_s:
                return busy

    def _cpu_s(self) -> dict[str, float]:
        return {m.name: meter.cpu_s(m.worker.processes()) for m in self.members.values()}

    @property
    def crashed(self) -> list[Ended]:
        """Return the workers that ended although nothing had been done to them."""
        return [ended for ended in self.ended if not ended.cause]
