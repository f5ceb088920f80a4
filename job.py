"""One job, from its submission to the authenticated end of its answer.

Owns the polling, the waiting, the reading of the platform's verdicts, the repair
from /status and the cancelling of what nobody waits for any more (SPEC section 10).
Knows nothing of what an answer says; `delivery` decides what is believed.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from answers import Progress
from crypto import AnswerOpener, Key, seal_request
from delivery import Delivery
from endpoint import Endpoint
from errors import (
    JobCancelled,
    JobError,
    JobFailed,
    JobTimedOut,
    NoWorker,
    Rejected,
    RequestError,
    SealedError,
    TooLarge,
    Unreachable,
)
from frames import AnswerEvent
from progress import PROGRESS_S, Reporter
from protocol import Request

FIRST_DELAY_S = 0.02
LONGEST_DELAY_S = 0.25
HELD_S = 0.5
"""An empty read that took this long was held by the platform; the next one may follow at once."""

OVER = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a job may take, in seconds; None leaves it to the platform."""

    timeout_s: float | None = None
    """Until the answer is complete."""
    wait_s: float | None = None
    """Until a worker takes it."""
    ttl_s: int | None = None
    """Until the platform forgets it."""
    execution_timeout_s: float | None = None
    """On the worker."""

    def policy(self) -> dict[str, int]:
        """Return the job's policy in the platform's terms."""
        policy = {}
        if self.ttl_s is not None:
            policy["ttl"] = self.ttl_s * 1000
        if self.execution_timeout_s is not None:
            policy["executionTimeout"] = int(self.execution_timeout_s * 1000)
        return policy


class Job:
    """A request on its way and its answer; submitted by the first `events`."""

    def __init__(
        self,
        endpoint: Endpoint,
        request: Request,
        key: Key,
        *,
        streamed: bool,
        limits: Limits,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.id = ""
        self.request = request
        self.request_id = request.request_id
        self.key_id = key.id
        self._endpoint = endpoint
        self._limits = limits
        self._reporter = Reporter(endpoint, on_progress)
        try:
            body: dict[str, Any] = {"input": {"sealed": seal_request(request, key)}}
        except RequestError as error:
            raise TooLarge(str(error)) from None
        if policy := limits.policy():
            body["policy"] = policy
        self._body = msgspec.json.encode(body)
        self._delivery = Delivery(AnswerOpener(request, key), streamed=streamed)
        self._status = "IN_QUEUE"
        self._over = False
        self._delay_s = 0.0
        self._submitted_s = 0.0
        self._deadline_s = float("inf")
        self._end_watch: Callable[[], object] | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self._over

    async def submit(self) -> None:
        """Hand the job to the platform, once."""
        if self.id or self._over:
            return
        self._submitted_s = time.monotonic()
        if self._limits.timeout_s is not None:
            self._deadline_s = self._submitted_s + self._limits.timeout_s
        try:
            await self._endpoint.transport.whole(self._run())
        except BaseException:
            await self.close()
            raise
        if self._reporter.wanted:
            self._end_watch = self._endpoint.transport.beside(self._watch())

    async def _run(self) -> None:
        self.id = await self._endpoint.run(self._body, self._deadline_s)
        self._body = b""

    async def events(self) -> list[AnswerEvent]:
        """Return the next events of the answer, or none when it has ended.

        Any exception, cancellation included, cancels the job.
        """
        await self.submit()
        try:
            while not self._over:
                if events := await self._poll():
                    return events
        except BaseException:
            await self.close()
            raise
        finally:
            self._unwatch()
        return []

    async def close(self) -> None:
        """Cancel the job unless it is over."""
        if self._over:
            return
        self._over = True
        self._unwatch()
        if self.id:
            await self._endpoint.transport.whole(self._cancel())

    async def _cancel(self) -> None:
        # Nobody is left to tell, and the platform ends the job by itself at its limits.
        with contextlib.suppress(JobError):
            await self._endpoint.cancel(self.id)

    async def _poll(self) -> list[AnswerEvent]:
        try:
            read = await self._endpoint.stream(self.id, self._next_limit_s())
        except Unreachable:
            await self._check_limits()
            raise
        self._status = read.status
        chunks = read.chunks
        events = self._delivery.take(chunks)
        if self._delivery.ended:
            self._over = True
            return events
        if read.status in OVER and not chunks:
            return await self._finish()
        if chunks:
            self._delay_s = 0.0
            return events
        await self._check_limits()
        if self._reporter.wanted and not self._end_watch:
            await self._report()
        if read.elapsed_s >= HELD_S:
            self._delay_s = 0.0
        else:
            self._delay_s = min(LONGEST_DELAY_S, max(FIRST_DELAY_S, 2 * self._delay_s))
            await self._endpoint.transport.sleep(self._delay_s)
        return []

    def _next_limit_s(self) -> float:
        if self._status == "IN_QUEUE" and self._limits.wait_s is not None:
            return min(self._deadline_s, self._submitted_s + self._limits.wait_s)
        return self._deadline_s

    async def _check_limits(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._deadline_s:
            raise JobTimedOut(
                f"no complete answer within {self._limits.timeout_s:g} s (the job was "
                f"{'still in the queue' if self._status == 'IN_QUEUE' else 'running'}); "
                "allow more time, or ask for less"
            )
        if now_s < self._next_limit_s():
            return
        # The read was cut short, so the job may have been taken meanwhile.
        view = await self._endpoint.status(self.id, now_s + 5)
        self._status = str(view.get("status"))
        if self._status == "IN_QUEUE":
            await self._reporter.ask_workers()
            raise NoWorker(
                f"no worker took the job within {self._limits.wait_s:g} s"
                f"{self._reporter.workers_in_words()}; allow a longer wait, or raise the "
                "endpoint's number of workers"
            )

    async def _watch(self) -> None:
        """Report beside the reads, which the platform may hold, until the job runs."""
        while self._reporter.wanted:
            await self._report()
            if self._status != "IN_QUEUE":
                return
            await self._endpoint.transport.sleep(PROGRESS_S)
            with contextlib.suppress(JobError):
                status = str((await self._endpoint.status(self.id)).get("status"))
                # Never back to a status that is older than what a read has told meanwhile.
                if self._status == "IN_QUEUE":
                    self._status = status

    def _unwatch(self) -> None:
        if self._end_watch:
            self._end_watch()
            self._end_watch = None
        self._reporter.end()

    async def _report(self) -> None:
        await self._reporter.report(self._status, self.id, self._submitted_s)

    async def _finish(self) -> list[AnswerEvent]:
        """The platform says that the job is over, but the answer has no end yet."""
        self._over = True
        try:
            view = await self._endpoint.status(self.id, self._deadline_s)
        except JobError as error:
            if self._status == "COMPLETED":
                raise self._delivery.fault() from error
            view = {}
        if self._status != "COMPLETED":
            raise verdict(self._status, view, self._endpoint.id, self.key_id)
        output = view.get("output")
        chunks = output if isinstance(output, list) else [] if output is None else [output]
        events = self._delivery.take(chunks)
        if not self._delivery.ended:
            raise self._delivery.fault()
        return events


def verdict(status: str, view: dict[str, Any], endpoint_id: str, key_id: str) -> SealedError:
    """Return what the platform says of a job that is over and was not completed."""
    said = view.get("error")
    text = said if isinstance(said, str) else "" if said is None else str(said)
    match status:
        case "CANCELLED":
            return JobCancelled("the job was cancelled on the platform")
        case "TIMED_OUT":
            return JobTimedOut(
                "the platform ended the job: it ran or waited longer than allowed; "
                "ask for less, or raise the endpoint's execution timeout"
            )
        case _ if Rejected.TEXT in text:
            return Rejected(
                "\nThe worker has another encryption key than this client, or somebody says "
                f"so. Check that the worker of endpoint {endpoint_id} has the key with "
                f"the id {key_id} in its ENCRYPTION_KEY, and that RUNPOD_ENDPOINT_ID "
                "is the right endpoint."
            )
        case _:
            return JobFailed(f"the job failed on the platform: {text[:500] or 'no reason given'}")
