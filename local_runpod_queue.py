"""Jobs, the queue and the workers of the local platform: the state machine, without HTTP.

Owns what a job is and how it moves: IN_QUEUE → IN_PROGRESS → COMPLETED, FAILED,
CANCELLED or TIMED_OUT, back to IN_QUEUE when its worker vanished, and out of
memory when its time is over. Refuses to know what an input or an output says:
both are carried, never looked into and never logged.

Everything here runs on one event loop. Times are `time.monotonic()` seconds.
"""

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

log = logging.getLogger("local_runpod")


class Status(StrEnum):
    """A job's status, in the platform's spelling."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def final(self) -> bool:
        """Return whether a job in this status is over."""
        return self not in (Status.IN_QUEUE, Status.IN_PROGRESS)


class Bell:
    """Wakes everything that waits for a change, without polling."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[bool], None] = {}

    def ring(self) -> None:
        """Wake every waiter."""
        for woken in self._waiting:
            if not woken.done():
                woken.set_result(True)

    async def wait(self, until_s: float) -> bool:
        """Wait for the next ring; return False when `until_s` on the monotonic clock came first."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[bool] = loop.create_future()

        def give_up() -> None:
            if not woken.done():
                woken.set_result(False)

        timer = loop.call_later(max(0.0, until_s - time.monotonic()), give_up)
        self._waiting[woken] = None
        try:
            return await woken
        finally:
            timer.cancel()
            del self._waiting[woken]


@dataclass(eq=False)
class Job:
    """One job; tests read it, only `Queue` writes it."""

    id: str
    input: Any = field(repr=False)
    execution_timeout_s: float
    ttl_s: float
    kept_s: float
    created_s: float = field(default_factory=time.monotonic)
    status: Status = Status.IN_QUEUE
    worker_id: str | None = None
    attempts: int = 0
    started_s: float | None = None
    first_chunk_s: float | None = None
    ended_s: float | None = None
    output: Any = field(default=None, repr=False)
    error: str | None = field(default=None, repr=False)
    chunks: deque[bytes] = field(default_factory=deque, repr=False)
    held_back: list[bytes] = field(default_factory=list, repr=False)
    chunks_received: int = 0
    chunks_delivered: int = 0
    changed: Bell = field(default_factory=Bell, repr=False)
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict, repr=False)

    def read(self) -> list[bytes]:
        """Consume the chunks that wait for a reader, each a JSON object as the worker sent it."""
        taken = list(self.chunks)
        self.chunks.clear()
        self.chunks_delivered += len(taken)
        return taken

    def unread(self, taken: Iterable[bytes]) -> None:
        """Put back what `read` returned and nobody received."""
        taken = list(taken)
        self.chunks.extendleft(reversed(taken))
        self.chunks_delivered -= len(taken)
        self.changed.ring()

    def view(self) -> dict[str, Any]:
        """Return the job as `/status` answers it; times in ms."""
        view: dict[str, Any] = {"id": self.id, "status": str(self.status)}
        if self.started_s is not None:
            view["delayTime"] = round((self.started_s - self.created_s) * 1000)
            view["workerId"] = self.worker_id
            if self.ended_s is not None:
                view["executionTime"] = round((self.ended_s - self.started_s) * 1000)
        if self.status is Status.COMPLETED and self.output is not None:
            view["output"] = self.output
        if self.error is not None:
            view["error"] = self.error
        return view


@dataclass(eq=False)
class Worker:
    """One worker as the platform sees it."""

    id: str
    ready: bool = False
    gone: bool = False
    draining: bool = False
    jobs: dict[str, Job] = field(default_factory=dict, repr=False)
    to_stop: list[str] = field(default_factory=list)
    stop_changed: Bell = field(default_factory=Bell, repr=False)
    polls: int = 0
    seen_s: float = field(default_factory=time.monotonic)
    pinged_s: float = 0.0
    pings: int = 0
    dropped_s: float | None = None


class Queue:
    """The queue of one endpoint and the workers that serve it.

    `retries` is how often a job goes back to the queue after losing its worker.
    """

    def __init__(self, *, retries: int = 3) -> None:
        self.jobs: dict[str, Job] = {}
        self.workers: dict[str, Worker] = {}
        self.counts = {"completed": 0, "failed": 0, "retried": 0}
        self.closing = False
        self._retries = retries
        self._queued: deque[Job] = deque()
        self._arrived = Bell()

    # -- clients -----------------------------------------------------------------------------

    def submit(
        self, input: Any, *, prefix: str, execution_timeout_s: float, ttl_s: float, kept_s: float
    ) -> Job:
        """Queue a job; it vanishes `ttl_s` from now, or `kept_s` after it ended."""
        job = Job(f"{prefix}{uuid.uuid4()}-u1", input, execution_timeout_s, ttl_s, kept_s)
        self.jobs[job.id] = job
        self._set_timer(job, "life", ttl_s, self._expire)
        self._enqueue(job)
        log.info("job %s queued", job.id)
        return job

    def cancel(self, job: Job) -> None:
        """Cancel the job if it is not over, and tell its worker to stop it."""
        if not job.status.final:
            self._stop(job)
            self._end(job, Status.CANCELLED)

    def retry(self, job: Job) -> None:
        """Queue a failed or timed-out job again under the same id, without its old output."""
        job.status, job.error, job.output = Status.IN_QUEUE, None, None
        job.attempts, job.started_s, job.ended_s, job.worker_id = 0, None, None, None
        job.first_chunk_s = None
        job.chunks.clear()
        left_s = job.created_s + job.ttl_s - time.monotonic()
        self._set_timer(job, "life", left_s, self._expire)
        self.counts["retried"] += 1
        self._enqueue(job)
        log.info("job %s queued again on request", job.id)

    def purge(self) -> int:
        """Cancel every job that no worker took yet; return how many."""
        waiting = [job for job in self._queued if job.status is Status.IN_QUEUE]
        for job in waiting:
            self._end(job, Status.CANCELLED)
        self._queued.clear()
        return len(waiting)

    def health(self) -> dict[str, dict[str, int]]:
        """Return the counts that `/health` answers."""
        states = [job.status for job in self.jobs.values()]
        present = [worker for worker in self.workers.values() if not worker.gone]
        ready = [worker for worker in present if worker.ready]
        running = sum(bool(worker.jobs) for worker in ready)
        return {
            "jobs": {
                "completed": self.counts["completed"],
                "failed": self.counts["failed"],
                "inProgress": states.count(Status.IN_PROGRESS),
                "inQueue": states.count(Status.IN_QUEUE),
                "retried": self.counts["retried"],
            },
            "workers": {
                "idle": len(ready) - running,
                "initializing": len(present) - len(ready),
                "ready": len(ready),
                "running": running,
                "throttled": 0,
                "unhealthy": len(self.workers) - len(present),
            },
        }

    # -- workers -----------------------------------------------------------------------------

    def worker(self, worker_id: str) -> Worker:
        """Return the worker of that id, known or new."""
        return self.workers.setdefault(worker_id, Worker(worker_id))

    async def take(
        self, worker: Worker, count: int, until_s: float, present: Callable[[], bool]
    ) -> list[Job]:
        """Wait for jobs and hand over up to `count`, or none when `until_s` passes.

        `present` is asked at the last moment, so that a poll whose client has
        gone leaves the jobs to the next one.
        """
        while not (worker.draining or self.closing):
            if self._queued:
                return self._hand_over(worker, count) if present() else []
            if not await self._arrived.wait(until_s):
                break
        return []

    def put_back(self, worker: Worker, jobs: Iterable[Job]) -> None:
        """Undo `take` for jobs that never reached the worker."""
        for job in jobs:
            if not worker.jobs.pop(job.id, None) or job.status is not Status.IN_PROGRESS:
                continue
            if self._held_elsewhere(job):
                self.deliver_again(job)
            else:
                job.attempts -= 1
                self._enqueue(job, front=True)
            log.info("job %s queued again: %s did not receive it", job.id, worker.id)

    def deliver_again(self, job: Job) -> None:
        """Hand a running job to the next poll as well: the duplicate delivery of a platform."""
        self._queued.appendleft(job)
        self._arrived.ring()

    async def stops(self, worker: Worker, until_s: float) -> list[str]:
        """Wait for jobs that the worker has to stop; empty when `until_s` passes."""
        while not (worker.to_stop or worker.draining or self.closing):
            if not await worker.stop_changed.wait(until_s):
                break
        ids, worker.to_stop = worker.to_stop, []
        return ids

    def add_chunk(
        self, job: Job, worker: Worker, chunk: bytes, *, copies: int = 1, hold_back: bool = False
    ) -> None:
        """Append a chunk; `hold_back` lets the next one overtake it."""
        if job.status.final:
            # The SDK forgets a stop that arrives before it began the job: say it again.
            if job.status is not Status.COMPLETED and job.id not in worker.to_stop:
                worker.to_stop.append(job.id)
                worker.stop_changed.ring()
            return
        if job.first_chunk_s is None:
            job.first_chunk_s = time.monotonic()
        job.chunks_received += 1
        if hold_back:
            job.held_back.append(chunk)
            return
        job.chunks.extend([chunk] * copies)
        self._release(job)
        job.changed.ring()

    def finish(self, job: Job, *, output: Any = None, error: str | None = None) -> None:
        """End a job as its worker reported it; a second report changes nothing."""
        if not job.status.final:
            self._release(job)
            job.output, job.error = output, error
            self._end(job, Status.COMPLETED if error is None else Status.FAILED)

    def drain(self, worker: Worker) -> None:
        """Give this worker no more jobs and end its held polls."""
        worker.draining = True
        self._arrived.ring()
        worker.stop_changed.ring()

    def lose(self, worker: Worker, reason: str) -> None:
        """Take the worker as gone: its jobs go back to the queue, or fail after the last retry."""
        if worker.gone:
            return
        worker.gone, worker.ready = True, False
        lost = [job for job in worker.jobs.values() if job.status is Status.IN_PROGRESS]
        worker.jobs.clear()
        worker.to_stop.clear()
        log.warning("worker %s is gone (%s), %d jobs lost it", worker.id, reason, len(lost))
        for job in lost:
            if self._held_elsewhere(job):
                continue
            if job.attempts > self._retries:
                job.error = f"job lost its worker {job.attempts} times"
                self._end(job, Status.FAILED)
                continue
            self.counts["retried"] += 1
            self._enqueue(job, front=True)

    def forget(self, worker: Worker) -> None:
        """Take out a worker whose process ended."""
        self.lose(worker, "process ended")
        self.workers.pop(worker.id, None)

    def close(self) -> None:
        """End every held poll and drop every timer."""
        self.closing = True
        self._arrived.ring()
        for worker in self.workers.values():
            worker.stop_changed.ring()
        for job in self.jobs.values():
            for timer in job.timers.values():
                timer.cancel()
            job.changed.ring()

    # -- inside ------------------------------------------------------------------------------

    def _enqueue(self, job: Job, *, front: bool = False) -> None:
        job.status = Status.IN_QUEUE
        self._cancel_timer(job, "execution")
        (self._queued.appendleft if front else self._queued.append)(job)
        self._arrived.ring()

    def _hand_over(self, worker: Worker, count: int) -> list[Job]:
        now_s = time.monotonic()
        jobs: list[Job] = []
        while self._queued and len(jobs) < count:
            job = self._queued.popleft()
            if job.status.final:
                continue
            if job.status is Status.IN_QUEUE:
                job.status = Status.IN_PROGRESS
                job.attempts += 1
                job.started_s = now_s
                self._set_timer(job, "execution", job.execution_timeout_s, self._time_out)
            job.worker_id = worker.id
            worker.jobs[job.id] = job
            jobs.append(job)
            job.changed.ring()
            log.info("job %s taken by %s, attempt %d", job.id, worker.id, job.attempts)
        return jobs

    def _release(self, job: Job) -> None:
        job.chunks.extend(job.held_back)
        job.held_back.clear()

    def _stop(self, job: Job) -> None:
        for worker in self.workers.values():
            if job.id in worker.jobs:
                worker.to_stop.append(job.id)
                worker.stop_changed.ring()

    def _end(self, job: Job, status: Status) -> None:
        job.status = status
        job.ended_s = time.monotonic()
        for worker in self.workers.values():
            worker.jobs.pop(job.id, None)
        if status is Status.COMPLETED:
            self.counts["completed"] += 1
        elif status in (Status.FAILED, Status.TIMED_OUT):
            self.counts["failed"] += 1
        self._cancel_timer(job, "execution")
        left_s = job.created_s + job.ttl_s - job.ended_s
        self._set_timer(job, "life", min(job.kept_s, left_s), self._expire)
        job.changed.ring()
        log.info("job %s %s", job.id, status)

    def _held_elsewhere(self, job: Job) -> bool:
        return any(job.id in worker.jobs for worker in self.workers.values())

    def _time_out(self, job: Job) -> None:
        self._stop(job)
        job.error = f"job ran longer than its execution timeout of {job.execution_timeout_s} s"
        self._end(job, Status.TIMED_OUT)

    def _expire(self, job: Job) -> None:
        if not job.status.final:
            self._stop(job)
            self._end(job, Status.TIMED_OUT)
        self._cancel_timer(job, "life")
        self.jobs.pop(job.id, None)

    def _set_timer(self, job: Job, name: str, delay_s: float, call: Callable[[Job], None]) -> None:
        self._cancel_timer(job, name)
        job.timers[name] = asyncio.get_running_loop().call_later(max(0.0, delay_s), call, job)

    def _cancel_timer(self, job: Job, name: str) -> None:
        if timer := job.timers.pop(name, None):
            timer.cancel()
