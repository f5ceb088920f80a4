"""The SDK's job loop with what a worker that owns an engine needs of it.

`runpod` 1.12 has no hook that runs inside its event loop before the first job, looks for
taken jobs ten times a second, loses a job that arrives after SIGTERM and hears of no
cancellation from then on, runs a job twice that is delivered twice, asks without a pause
for jobs where nobody listens, stays without memory for any, and drops what it posts when
the connection breaks, an answer's end too. `JobLoop` is its `JobScaler` with these mended,
and `run` has it post again; taking, posting, cancelling and pinging stay the SDK's. Knows
nothing of engines or of encryption.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import runpod
from aiohttp import ClientConnectionError
from aiohttp_retry import ExponentialRetry
from runpod.http_client import AsyncClientSession, TooManyRequests
from runpod.serverless.modules import rp_fitness, rp_http, rp_job, rp_scale

TAKE_GRACE_S = 2.0
"""After SIGTERM: how long the poll for jobs may still deliver one, before it is given up."""

FAILURE_GRACE_S = 5.0
"""After a failure: how long running jobs may take to tell their clients."""

END_S = 30
"""After a failure: how long the whole way out may take, before the kernel ends the process."""

HEALTH_INTERVAL_S = 0.25

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
"""Between two polls that failed: the pause doubles from the first to the longest."""

POSTS = 6
"""How often a chunk or a result is posted at most, within eight seconds and what the posts take."""


@dataclass(frozen=True)
class Worker:
    """What the loop runs: `lifespan` surrounds all jobs inside the loop, `failed` ends it.

    `fitness` is checked before there is a loop: what one raises is told to the platform, and ends
    the process with 1 at once.
    """

    handler: Callable[[dict[str, Any]], AsyncIterator[Any]]
    lifespan: Callable[[], AbstractAsyncContextManager[None]]
    failed: Callable[[], bool]
    max_concurrency: int
    fitness: Sequence[Callable[[], None]] = ()
    connected: Callable[[], None] = lambda: None
    """Called when the SDK has read all that it reads of the environment."""


def run(worker: Worker) -> bool:
    """Serve jobs by the real SDK until SIGTERM or failure; return whether it was a failure."""
    loops: list[JobLoop] = []

    def job_scaler(config: dict[str, Any]) -> JobLoop:
        loops.append(JobLoop(config, worker))
        return loops[-1]

    for check in worker.fitness:
        runpod.serverless.register_fitness_check(check)
    rp_scale.JobScaler = job_scaler
    rp_http.FibonacciRetry = _posted_again
    runpod.serverless.start({"handler": worker.handler, "return_aggregate_stream": True})
    return any(loop.failed for loop in loops)


def _posted_again(**_: Any) -> ExponentialRetry:
    """Return when what failed is posted again; the SDK's own rule is: after a 5xx, twice.

    Whether what was posted before a connection broke has arrived cannot be known: the chunk may
    stand twice in the stream, as after a 5xx.
    """
    return ExponentialRetry(
        attempts=POSTS,
        start_timeout=FIRST_PAUSE_S / 2,  # which it doubles once before it is used
        exceptions={ClientConnectionError},
    )


class JobLoop(rp_scale.JobScaler):  # type: ignore[misc]
    """`JobScaler` of runpod 1.12.0."""

    def __init__(self, config: dict[str, Any], worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker
        self._takes_no_more = asyncio.Event()
        self.failed = False
        # A changed concurrency makes the SDK wait until the worker is idle: set it once.
        self.current_concurrency = worker.max_concurrency
        self.concurrency_modifier = lambda _: self.current_concurrency
        self.jobs_queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=self.current_concurrency)
        self.jobs_fetcher = self._fetch
        self._pause_s = FIRST_PAUSE_S

    async def run(self) -> None:
        """Take and run jobs inside the worker's lifespan until it is told to stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.kill_worker)
        async with self._started(), AsyncClientSession() as session:
            self._worker.connected()
            take = asyncio.create_task(self.get_jobs(session))
            stop = asyncio.create_task(self.monitor_stop_signals(session))
            jobs = asyncio.create_task(self.run_jobs(session))
            watch = asyncio.create_task(self._watch())
            for task in (take, jobs):
                task.add_done_callback(self._fail_with)
            await self._shutdown_event.wait()
            if not self.failed:
                await asyncio.wait([take], timeout=TAKE_GRACE_S)
            take.cancel()
            await asyncio.wait([take])
            self._takes_no_more.set()
            await asyncio.wait([jobs], timeout=FAILURE_GRACE_S if self.failed else None)
            for task in (jobs, stop, watch):
                task.cancel()
            await asyncio.gather(jobs, stop, watch, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _started(self) -> AsyncIterator[None]:
        """Enter the worker's lifespan; that it cannot be entered is told like a failed check."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._worker.lifespan())
            except Exception as error:
                rp_fitness._report_unhealthy("engine_answers", type(error).__name__)
                raise
            yield

    async def _fetch(self, session: Any, jobs_needed: int) -> Any:
        """Take jobs; after a failure pause, longer each time, before the SDK asks again."""
        try:
            jobs = await rp_job.get_job(session, jobs_needed)
        except (asyncio.CancelledError, TimeoutError, TooManyRequests):  # the SDK pauses by itself
            raise
        except MemoryError:
            # What was being taken is lost here: only another worker can be given it again.
            self._fail()
            raise
        except Exception:
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            raise
        self._pause_s = FIRST_PAUSE_S
        return jobs

    async def monitor_stop_signals(self, session: Any) -> None:
        """Stop jobs as they are cancelled, after SIGTERM too, for as long as the others run."""
        await super().monitor_stop_signals(session)
        while True:
            with contextlib.suppress(Exception):  # whatever it was, it is asked again
                poll = self.stop_signals_fetcher(session)
                for job_id in await asyncio.wait_for(poll, self.stop_signals_fetcher_timeout):
                    await self.stop_job(job_id)
            await asyncio.sleep(FIRST_PAUSE_S)

    async def run_jobs(self, session: Any) -> None:
        """Start every job the moment it is taken, until none can come, and wait for all."""
        running: set[asyncio.Task[None]] = set()
        no_more = asyncio.create_task(self._takes_no_more.wait())
        while not (no_more.done() and self.jobs_queue.empty()):
            taken = asyncio.create_task(self.jobs_queue.get())
            await asyncio.wait([taken, no_more], return_when=asyncio.FIRST_COMPLETED)
            if not taken.done():
                taken.cancel()
                continue
            job = taken.result()
            earlier = self.jobs_tasks.get(job["id"])
            if earlier is None:
                task = asyncio.create_task(self.handle_job(session, job))
                self.jobs_tasks[job["id"]] = task
            elif earlier.cancelling():
                task = asyncio.create_task(self._run_again(earlier, session, job))
            else:
                # The run in progress answers for both. A second one's result would end the job,
                # and a stop would find only one of the two.
                self.jobs_queue.task_done()
                continue
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running, return_exceptions=True)

    async def _run_again(self, stopped: asyncio.Task[None], session: Any, job: Any) -> None:
        await asyncio.wait([stopped])
        self.jobs_tasks[job["id"]] = asyncio.current_task()
        self.job_progress.add(job)
        await self.handle_job(session, job)

    async def _watch(self) -> None:
        while not self._worker.failed():  # the engine's death sets no event
            await asyncio.sleep(HEALTH_INTERVAL_S)
        self._fail()

    def _fail_with(self, task: asyncio.Task[None]) -> None:
        # Without it jobs would be taken and not run, or none taken for ever.
        if not task.cancelled() and task.exception():
            self._fail()

    def _fail(self) -> None:
        self.failed = True
        # Without memory nothing else can be relied on to come to its end.
        signal.alarm(END_S)
        self.kill_worker()
