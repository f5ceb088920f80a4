"""How long a start took and where the time went: a record of phases, shown and kept.

Owns the record's form, its table for the log and its place on the volume, where a later start, on
another machine too, can be held against it (`readiness_report.py`). Knows nothing of models,
engines or the platform. Phases overlap: what the preparation does while vLLM is imported costs
nothing, and the table shows it.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PHASES = (
    "imports",
    "resolve",
    "verify",
    "download",
    "prefetch",
    "compile cache",
    "engine core",
    "weights",
    "compile",
    "warm-up",
    "application",
    "first generation",
    "adapters",
    "taking jobs",
)
"""Every phase, in the order in which the table has them."""

FORM = 1
KEPT = 64
"""Records that a volume keeps; older ones go."""

Facts = dict[str, int | float | str]

Timed = Callable[[str], contextlib.AbstractContextManager[Any]]
"""Times a phase by its name; gives a mapping, and what is put into it is kept with the phase."""


@dataclass(frozen=True)
class Phase:
    """One stretch of a start; times in seconds since the process began."""

    name: str
    began_s: float
    took_s: float
    facts: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def ended_s(self) -> float:
        """When it was over."""
        return self.began_s + self.took_s


@contextlib.contextmanager
def timed(name: str, add: Callable[[str, float, float, Facts], object]) -> Iterator[Facts]:
    """Time what happens inside and `add` it: name, begin and end since the epoch, its facts."""
    facts: Facts = {}
    began_at = time.time()
    try:
        yield facts
    finally:
        add(name, began_at, time.time(), facts)


class Readiness:
    """The phases of this process's start."""

    def __init__(self, started_at: float | None = None) -> None:
        """Begin at `started_at` (seconds since the epoch), by default when the process began."""
        self.started_at = psutil.Process().create_time() if started_at is None else started_at
        self.phases: list[Phase] = []
        self.about: dict[str, Any] = {}

    def phase(self, name: str) -> contextlib.AbstractContextManager[Facts]:
        """Time what happens inside; what is put into the mapping is kept with it."""
        return timed(name, self.add)

    def add(self, name: str, began_at: float, ended_at: float, facts: Facts | None = None) -> None:
        """Add a phase that was timed elsewhere, in seconds since the epoch."""
        if name not in PHASES:
            raise ValueError(f"no such phase: {name}")
        took_s = max(0.0, ended_at - began_at)
        began_s = max(0.0, began_at - self.started_at)
        self.phases.append(Phase(name, round(began_s, 3), round(took_s, 3), facts or {}))

    @property
    def ready_s(self) -> float:
        """Seconds from the process's begin to the end of its last phase."""
        return max((phase.ended_s for phase in self.phases), default=0.0)

    def record(self) -> dict[str, Any]:
        """Return the record as JSON's types; phases of one name (several models) are separate."""
        ordered = sorted(self.phases, key=lambda phase: (PHASES.index(phase.name), phase.began_s))
        return {
            "form": FORM,
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started_at)),
            "ready_s": round(self.ready_s, 3),
            **self.about,
            "phases": [
                {"name": p.name, "began_s": p.began_s, "took_s": p.took_s, **p.facts}
                for p in ordered
            ],
        }

    def table(self) -> str:
        """Return the phases as a small table for the log."""
        lines = [f"ready after {self.ready_s:.1f} s", f"{'phase':<18}{'from':>8}{'took':>8}"]
        for phase in self.record()["phases"]:
            shown = " ".join(
                f"{name}={value}"
                for name, value in phase.items()
                if name not in ("name", "began_s", "took_s")
            )
            times = f"{phase['began_s']:>7.1f}s{phase['took_s']:>7.1f}s"
            lines.append(f"{phase['name']:<18}{times}  {shown}".rstrip())
        return "\n".join(lines)

    def line(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps(self.record(), separators=(",", ":"))

    def keep(self, folder: Path, worker: str) -> Path:
        """Write the record into `folder`, one file for each start, and remove the oldest.

        OSError where the volume cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.started_at))
        path = folder / f"{stamp}-{re.sub(r'[^A-Za-z0-9._-]', '_', worker)[:64]}.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"worker": worker, **self.record()}) + "\n")
        temporary.replace(path)
        for old in sorted(folder.glob("*.json"))[:-KEPT]:
            old.unlink(missing_ok=True)
        return path


def kept(folder: Path, last: int = KEPT) -> list[dict[str, Any]]:
    """Return the last records of a volume, oldest first; what is no record is passed over."""
    records = []
    for path in sorted(folder.glob("*.json"))[-last:]:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            record = json.loads(path.read_text())
            if record["form"] == FORM and isinstance(record["phases"], list):
                records.append(record)
    return records
