"""The ledger of a run: what became of every job, and what may become of one.

Owns the closed list of outcomes and the judgement of each. A typed error is good only where
something was done that explains it: a worker's own failure, a chunk that does not open or a
job that ran into its limit for no reason of the platform's is a fault of ours, however politely
it is told. Starts and calls nothing.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from errors import (
    EndpointNotFound,
    JobCancelled,
    JobError,
    JobFailed,
    JobTimedOut,
    MissingChunk,
    NotOver,
    RequestError,
    RestartedAnswer,
    SealedError,
    TruncatedAnswer,
)

PLATFORMS_WORDS = ("lost its worker", "job ended as", "injected fault")
"""What the local platform says of a job that it failed itself."""


class Verdict(StrEnum):
    """What a job ended in; the last four are never good."""

    EXACT = "exact text"
    ERROR = "typed error"
    CANCELLED = "cancellation asked for"
    WRONG = "wrong or short text"
    UNEXPLAINED = "error without a cause"
    UNTYPED = "untyped exception"
    LOST = "lost"

    @property
    def good(self) -> bool:
        """Return whether a job may end so."""
        return self in (Verdict.EXACT, Verdict.ERROR, Verdict.CANCELLED)


@dataclass(eq=False)
class Job:
    """One job as its caller sees it."""

    index: int
    kind: str
    expected: str
    began_s: float = field(default_factory=time.monotonic)
    id: str = ""
    cancelled: bool = False
    """Whether its caller, or the platform's operator, asked for its end."""
    result_lost: bool = False
    """Whether the platform was made to lose the worker's last word on it."""
    one_connection: bool = False
    """Whether it is asked by the OpenAI route, where nothing can be repaired from the result."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job; `detail` says it without the text."""

    job: Job
    verdict: Verdict
    detail: str
    took_s: float


@dataclass
class Ledger:
    """All outcomes, and the causes that explain errors."""

    outcomes: list[Outcome] = field(default_factory=list)
    engine_died: bool = False
    clock_off_until_s: float = 0.0
    """Until when, on the monotonic clock, a worker's clock was off by more than it tolerates."""
    asked: dict[str, float] = field(default_factory=dict)
    """The jobs that the platform's operator cancelled, by id, and when."""

    def said(self, job: Job, text: str) -> None:
        """Note an answer that was presented as good."""
        if text == job.expected:
            self._add(job, Verdict.EXACT, "")
        else:
            at = next(
                (n for n, (a, b) in enumerate(zip(text, job.expected, strict=False)) if a != b),
                min(len(text), len(job.expected)),
            )
            told = f"{len(text)} characters for {len(job.expected)}, another from {at} on"
            self._add(job, Verdict.WRONG, told)

    def left(self, job: Job) -> None:
        """Note that the caller went away, as it meant to."""
        self._add(job, Verdict.CANCELLED, "left")

    def lost(self, job: Job) -> None:
        """Note that nothing came of a job in all the time that it was given."""
        self._add(job, Verdict.LOST, "no end")

    def failed(self, job: Job, error: Exception) -> None:
        """Note an error."""
        told = type(error).__name__
        if isinstance(error, RequestError):
            told += f" {error.code}"
        self._add(job, self._verdict(job, error), told)

    def _verdict(self, job: Job, error: Exception) -> Verdict:
        asked = job.cancelled or job.id in self.asked
        if not job.id:  # it ended before its caller was told its id
            asked |= any(at_s > job.began_s for at_s in self.asked.values())
        clock_off = self.clock_off_until_s > job.began_s
        match error:
            case JobCancelled():
                return Verdict.CANCELLED if asked else Verdict.UNEXPLAINED
            case JobTimedOut():
                # Nothing else keeps a job from its end for as long as it may run.
                return Verdict.ERROR if job.result_lost else Verdict.LOST
            case JobFailed() if not any(words in str(error) for words in PLATFORMS_WORDS):
                return Verdict.UNEXPLAINED
            case RequestError(code="engine_dead"):
                return Verdict.ERROR if self.engine_died else Verdict.UNEXPLAINED
            case RequestError(code="expired" | "not_yet_valid"):
                return Verdict.ERROR if clock_off else Verdict.UNEXPLAINED
            case RequestError(code="already_running" | "replayed"):
                return Verdict.ERROR
            case MissingChunk() | TruncatedAnswer():
                repairable = not (job.one_connection or job.result_lost)
                return Verdict.UNEXPLAINED if repairable else Verdict.ERROR
            case EndpointNotFound() | NotOver():
                return Verdict.UNEXPLAINED
            case RestartedAnswer() | JobError():
                return Verdict.ERROR
            case SealedError():
                return Verdict.UNEXPLAINED
            case _:
                return Verdict.UNTYPED

    def _add(self, job: Job, verdict: Verdict, detail: str) -> None:
        self.outcomes.append(Outcome(job, verdict, detail, time.monotonic() - job.began_s))

    def count(self, verdict: Verdict) -> int:
        """Return how many jobs ended so."""
        return sum(outcome.verdict is verdict for outcome in self.outcomes)

    @property
    def bad(self) -> list[Outcome]:
        """Return the jobs that ended as none may."""
        return [outcome for outcome in self.outcomes if not outcome.verdict.good]

    def summary(self) -> str:
        """Return the counts of verdicts and of errors, for people."""
        verdicts = Counter(str(outcome.verdict) for outcome in self.outcomes)
        errors = Counter(o.detail for o in self.outcomes if o.verdict is Verdict.ERROR)
        parts = [f"{count} {name}" for name, count in verdicts.most_common()]
        told = ", ".join(f"{count} {name}" for name, count in errors.most_common())
        return "; ".join(parts) + (f" ({told})" if told else "")

    def complaints(self, limit: int = 12) -> str:
        """Return what is wrong, job by job."""
        lines = [f"{len(self.bad)} of {len(self.outcomes)} jobs ended as none may"]
        for outcome in self.bad[:limit]:
            job = outcome.job
            lines.append(
                f"  job {job.index} {job.id} ({job.kind}, {outcome.took_s:.1f} s): "
                f"{outcome.verdict}, {outcome.detail}"
            )
        return "\n".join(lines)
