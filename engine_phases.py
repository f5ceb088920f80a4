"""What vLLM's own log tells of a start, whichever of its processes says it.

vLLM 0.30 to 0.32 tell how long weights, compilation and warm-up took in their log and nowhere
else, and from processes of their own. `PhaseFilter` stands in every one of them
(`vllm_logging.json`), recognises these lines and notes their times in one file. Lets every record
pass. Where VLLM_LOGGING_LEVEL is above INFO there are no such lines, and the phases are missing.
"""

import contextlib
import json
import logging
import os
import re
from pathlib import Path

from worker_environment import environment

VARIABLE = "WORKER_PHASES_FILE"
"""Names the file in the environment of vLLM's processes."""

_SECONDS = r"([\d.]+) (?:s\b|seconds)"
_TOLD = (
    ("weights", re.compile(rf"^Loading weights took {_SECONDS}")),
    ("compile", re.compile(rf"torch\.compile took {_SECONDS} in total")),
    ("warm-up", re.compile(rf"^init engine \(profile, .* took {_SECONDS}")),
)
# The CPU engine says when, not how long.
_BEGINS = re.compile(r"^Warming up model for the compilation")
_ENDS = re.compile(r"^Warming up done")


class PhaseFilter(logging.Filter):
    """A filter that notes vLLM's phases and lets every record pass."""

    def __init__(self) -> None:
        super().__init__()
        self._path = environment().get(VARIABLE, "")
        self._compiling_since = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if self._path and record.name.startswith("vllm") and isinstance(record.msg, str):
            with contextlib.suppress(OSError, ValueError, TypeError):
                self._note(record)
        return True

    def _note(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if _BEGINS.match(message):
            self._compiling_since = record.created
        elif _ENDS.match(message) and self._compiling_since:
            self._write("compile", self._compiling_since, record.created)
        else:
            for name, pattern in _TOLD:
                if told := pattern.search(message):
                    self._write(name, record.created - float(told.group(1)), record.created)

    def _write(self, name: str, began_at: float, ended_at: float) -> None:
        # One write of one short line: lines of several processes do not mix.
        line = json.dumps({"name": name, "began_at": began_at, "ended_at": ended_at}) + "\n"
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)


def noted(path: Path) -> dict[str, tuple[float, float]]:
    """Return each phase's begin and end, in seconds since the epoch, over all processes."""
    phases: dict[str, tuple[float, float]] = {}
    for line in path.read_text().splitlines():
        phase = json.loads(line)
        began, ended = phases.get(phase["name"], (phase["began_at"], phase["ended_at"]))
        phases[phase["name"]] = (min(began, phase["began_at"]), max(ended, phase["ended_at"]))
    return phases
