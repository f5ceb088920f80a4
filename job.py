"""One job, from its submission to the authenticated end of its answer.

Owns what every way to the endpoint has in common: sealing, limits, what the
platform's verdicts mean, and that a job nobody waits for any more is ended (SPEC
section 10). How a job is sent and read is in `job_polled` and `job_route`. Knows
nothing of what an answer says; `delivery` decides what is believed.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from answers import Progress
from crypto import AnswerOpener, seal_request
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
)
from frames import AnswerEvent
from hpke import Envelope
from keys import Key
from progress import PROGRESS_S, Reporter
from protocol import Request

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


class Job(ABC):
    """A request on its way and its answer; submitted by the first `events`."""

    def __init__(
        self,
        endpoint: Endpoint,
        request: Request,
        key: Key,
        envelope: Envelope | None = None,
        *,
        streamed: bool,
        limits: Limits,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.id = ""
        self.request = request
        self.request_id = request.request_id
        self.key_id = key.id
        self.public_key_id = envelope.worker_key.id if envelope else None
        self.envelope = envelope
        self._endpoint = endpoint
        self._limits = limits
        self._reporter = Reporter(endpoint, on_progress)
        try:
            self._sealed = seal_request(request, key, envelope)
        except RequestError as error:
            raise TooLarge(str(error)) from None
        opener = AnswerOpener(request, key, envelope.reply_key if envelope else None)
        self._delivery = Delivery(opener, streamed=streamed)
        self._status = "IN_QUEUE"
        self._over = False
        self._submitted_s: float | None = None
        self._deadline_s = float("inf")
        self._end_watch: Callable[[], object] | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self._over

    @property
    def note(self) -> str:
        """The worker's last word on how the wait goes."""
        return self._delivery.note

    async def submit(self) -> None:
        """Hand the job to the platform, once."""
        if self._submitted_s is not None or self._over:
            return
        self._submitted_s = time.monotonic()
        if self._limits.timeout_s is not None:
            self._deadline_s = self._submitted_s + self._limits.timeout_s
        try:
            await self._send()
        except BaseException:
            await self.close()
            raise
        self._sealed = ""

    async def events(self) -> list[AnswerEvent]:
        """Return the next events of the answer, or none when it has ended.

        Any exception, cancellation included, cancels the job.
        """
        await self.submit()
        try:
            while not self._over:
                if events := await self._read():
                    return events
        except BaseException:
            await self.close()
            raise
        finally:
            self._unwatch()
        await self._leave()
        return []

    async def close(self) -> None:
        """Cancel the job unless it is over."""
        if self._over:
            await self._leave()
            return
        self._over = True
        self._unwatch()
        await self._abandon()

    @abstractmethod
    async def _send(self) -> None:
        """Hand the sealed request to the platform, and begin to watch when there is what to."""

    @abstractmethod
    async def _read(self) -> list[AnswerEvent]:
        """Wait for more of the answer; `_over` is set with its end."""

    @abstractmethod
    async def _abandon(self) -> None:
        """Have the platform end the job, if it has it."""

    @abstractmethod
    async def _leave(self) -> None:
        """Give back what a job that is over still holds."""

    @abstractmethod
    async def _look(self) -> None:
        """Find out, beside the reads, whether the job is still queued; or raise JobError."""

    # -- limits ------------------------------------------------------------------------------

    @property
    def _queued(self) -> bool:
        return self._status == "IN_QUEUE"

    def _next_limit_s(self) -> float:
        if self._queued and self._limits.wait_s is not None:
            return min(self._deadline_s, (self._submitted_s or 0.0) + self._limits.wait_s)
        return self._deadline_s

    def _timed_out(self) -> JobTimedOut:
        return JobTimedOut(
            f"no complete answer within {self._limits.timeout_s:g} s (the job was "
            f"{'still in the queue' if self._queued else 'running'}); "
            "allow more time, or ask for less"
        )

    async def _no_worker(self) -> NoWorker:
        await self._reporter.ask_workers()
        return NoWorker(
            f"no worker took the job within {self._limits.wait_s:g} s"
            f"{self._reporter.workers_in_words()}; allow a longer wait, or raise the "
            "endpoint's number of workers"
        )

    # -- progress ----------------------------------------------------------------------------

    def _begin_watch(self) -> None:
        if self._reporter.wanted:
            self._end_watch = self._endpoint.transport.beside(self._watch())

    async def _watch(self) -> None:
        """Report beside the reads, which the platform may hold, until the job runs."""
        while self._reporter.wanted:
            await self._report()
            if not self._queued:
                return
            await self._endpoint.transport.sleep(PROGRESS_S)
            with contextlib.suppress(JobError):
                await self._look()

    def _unwatch(self) -> None:
        if self._end_watch:
            self._end_watch()
            self._end_watch = None
        self._reporter.end()

    async def _report(self) -> None:
        submitted_s = self._submitted_s or 0.0
        await self._reporter.report(self._status, self.id, submitted_s, self.note)


def verdict(
    status: str, view: dict[str, Any], endpoint_id: str, key_id: str, public_key_id: str | None
) -> SealedError:
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
            pair = (
                "here none is set; where the worker's log has a line `public key …`, it is needed"
            )
            if public_key_id:
                pair = f"its id here is {public_key_id}; the worker's log says `public key …`"
            return Rejected(
                "\nThe worker has another encryption key than this client, or another version of "
                "the protocol, or somebody says so. Check that the worker of endpoint "
                f"{endpoint_id} has the key with the id {key_id} in its ENCRYPTION_KEY, that "
                "RUNPOD_ENDPOINT_ID is the right endpoint, that HPKE_PUBLIC_KEY here belongs to "
                f"its HPKE_PRIVATE_KEY ({pair}), and that both sides are of the same release."
            )
        case _:
            return JobFailed(f"the job failed on the platform: {text[:500] or 'no reason given'}")
