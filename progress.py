"""Progress: what a caller is told of a job that has not begun to answer, and how often.

Knows nothing of how a job's status is learnt; asks the platform for its workers alone.
"""

import contextlib
import time
from collections.abc import Callable

from answers import Progress
from endpoint import Endpoint
from errors import JobError

PROGRESS_S = 1.0
HEALTH_S = 5.0


class Reporter:
    """Tells of one job: each change and word of the worker at once, a queue every second."""

    def __init__(self, endpoint: Endpoint, on_progress: Callable[[Progress], None] | None) -> None:
        self.workers: dict[str, int] | None = None
        self._endpoint = endpoint
        self._on_progress = on_progress
        self._told = ("", "", 0.0)
        self._asked_s = float("-inf")

    @property
    def wanted(self) -> bool:
        """Whether anybody listens."""
        return self._on_progress is not None

    def end(self) -> None:
        """Tell nothing more."""
        self._on_progress = None

    async def report(self, status: str, job_id: str, submitted_s: float, note: str = "") -> None:
        """Tell where the job stands; `submitted_s` is on the monotonic clock."""
        state = "queued" if status == "IN_QUEUE" else "running"
        now_s = time.monotonic()
        *before, at_s = self._told
        if [state, note] == before and (state == "running" or now_s - at_s < PROGRESS_S):
            return
        self._told = (state, note, now_s)
        if state == "queued":
            await self.ask_workers()
        if self._on_progress:
            waited_s = time.monotonic() - submitted_s
            self._on_progress(Progress(state, waited_s, job_id, self.workers, note))

    async def ask_workers(self) -> None:
        """Ask the platform for its workers, unless it was asked a moment ago."""
        now_s = time.monotonic()
        if now_s - self._asked_s < HEALTH_S:
            return
        self._asked_s = now_s
        with contextlib.suppress(JobError):
            workers = (await self._endpoint.health()).get("workers")
            if isinstance(workers, dict):
                self.workers = {k: v for k, v in workers.items() if isinstance(v, int)}

    def workers_in_words(self) -> str:
        """Return the counts of workers as the end of a clause, empty if they are not known."""
        if not self.workers:
            return ""
        idle, running = self.workers.get("idle", 0), self.workers.get("running", 0)
        starting = self.workers.get("initializing", 0)
        return f" (workers: {idle} idle, {running} running, {starting} starting)"
