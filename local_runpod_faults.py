"""Faults on demand for the local platform: what goes wrong, where and how often.

Owns the description of a fault and the decision whether it strikes a request;
the server carries it out. Knows nothing of HTTP or of jobs' contents.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

WORKER_OPERATIONS = frozenset({"job-take", "job-stop", "job-stream", "job-done", "ping"})
CLIENT_OPERATIONS = frozenset(
    {"run", "runsync", "status", "stream", "cancel", "retry", "purge-queue", "health", "openai"}
)
_ONLY_FOR = {
    "duplicate": {"job-take", "job-stream"},
    "drop": {"job-stream", "job-done"},
    "reorder": {"job-stream"},
    "cut": {"openai"},
}
_JSON_FIELDS: dict[str, tuple[type, ...]] = {
    "operation": (str,),
    "job_id": (str,),
    "worker_id": (str,),
    "nth": (int,),
    "count": (int,),
    "probability": (int, float),
    "seed": (int,),
    "when": (str,),
    "delay_s": (int, float),
    "status": (int,),
    "reset": (bool,),
    "duplicate": (int,),
    "drop": (bool,),
    "reorder": (bool,),
    "cut": (int,),
}


@dataclass(kw_only=True)
class Fault:
    """One fault. Which requests it strikes:

    - `operation`: one of `WORKER_OPERATIONS` or `CLIENT_OPERATIONS` (`job-take` includes batches);
      `job_id` and `worker_id` narrow it down;
    - `nth`: the first such request to strike, from 1; `count`: how many from there on.
      With `nth` alone exactly that one is struck, with neither all are;
    - `probability` and `seed`: strike only some of those, the same ones for the same seed.

    What it does to them, all that are given together:

    - `delay_s`: wait; `status`: answer with this HTTP status; `reset`: reset the connection.
      `when` says whether these come before the request is processed (and, for the last two,
      instead of it) or after it, so that it took effect and only the answer is lost;
    - `duplicate`: deliver the chunk or hand out the job that many more times;
    - `drop`: answer 200 and forget what was sent; `reorder`: let the next chunk overtake this one;
    - `cut`: end a streamed answer after so many chunks, as a platform that limits its time does;
      with `reset` and `when` after, by a reset instead of an orderly end;
    - `tamper`: change the bytes of the request's body, or of the answer's where there is none.
    """

    operation: str
    job_id: str | None = None
    worker_id: str | None = None
    nth: int | None = None
    count: int | None = None
    probability: float = 1.0
    seed: int = 0
    when: Literal["before", "after"] = "before"
    delay_s: float = 0.0
    status: int | None = None
    reset: bool = False
    duplicate: int = 0
    drop: bool = False
    reorder: bool = False
    cut: int = 0
    tamper: Callable[[bytes], bytes] | None = None
    seen: int = field(default=0, init=False)
    hits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.operation not in WORKER_OPERATIONS | CLIENT_OPERATIONS:
            raise ValueError(f"unknown operation {self.operation!r}")
        if self.when not in ("before", "after"):
            raise ValueError("when must be 'before' or 'after'")
        for name, operations in _ONLY_FOR.items():
            if getattr(self, name) and self.operation not in operations:
                raise ValueError(f"{name} works on {', '.join(sorted(operations))} only")
        self._random = random.Random(self.seed)  # noqa: S311 - reproducible, not secret

    def strikes(self, operation: str, job_id: str | None, worker_id: str | None) -> bool:
        """Count the request if it matches and return whether it is struck."""
        if operation != self.operation:
            return False
        if self.job_id not in (None, job_id) or self.worker_id not in (None, worker_id):
            return False
        self.seen += 1
        first = self.nth or 1
        count = self.count if self.count is not None else 1 if self.nth else None
        if self.seen < first or (count is not None and self.seen >= first + count):
            return False
        if self._random.random() >= self.probability:
            return False
        self.hits += 1
        return True

    def view(self) -> dict[str, Any]:
        """Return the fault as JSON."""
        return {**asdict(self), "tamper": self.tamper is not None}


class Faults:
    """The faults in force; empty to begin with."""

    def __init__(self) -> None:
        self.active: list[Fault] = []

    def add(self, operation: str, **what: Any) -> Fault:
        """Put a fault in force and return it; its `hits` tells how often it struck."""
        fault = Fault(operation=operation, **what)
        self.active.append(fault)
        return fault

    def add_json(self, body: Any) -> Fault:
        """Like `add`, from a JSON object; raises ValueError where it is malformed."""
        if not isinstance(body, dict) or not isinstance(body.get("operation"), str):
            raise ValueError("a fault is a JSON object with at least an operation")
        if unknown := set(body) - set(_JSON_FIELDS):
            raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}")
        for name, value in body.items():
            if not isinstance(value, _JSON_FIELDS[name]):
                raise ValueError(f"{name} has the wrong type")
        return self.add(**body)

    def clear(self) -> None:
        """Take every fault out of force."""
        self.active.clear()

    def strike(self, operation: str, job_id: str | None, worker_id: str | None) -> list[Fault]:
        """Return the faults that strike this request."""
        if not self.active:
            return []
        return [f for f in list(self.active) if f.strikes(operation, job_id, worker_id)]
