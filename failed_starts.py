"""Starts of the worker that did not come up: one that failed once is told from many in a row.

Owns a small file for each worker of an endpoint on the volume, with how often in a row it has begun
a start that brought nothing, and why the last one ended, where it could still say so. A good start
removes it. Knows nothing of why starts fail.
"""

import contextlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OFTEN = 3
"""From so many failed starts in a row on, it is not taken for chance."""

FORGOTTEN_S = 7 * 24 * 3600
"""Files of workers that have not been seen for so long go."""

SILENT = "it was killed or ended without a word, such as for want of memory"


@dataclass(frozen=True)
class _Series:
    """The failed starts of one worker in a row, as its file tells them."""

    failed: int
    since: str
    reason: str


class FailedStarts:
    """The starts of this worker and of the others of its endpoint, as the volume tells them."""

    def __init__(self, folder: Path, endpoint: str, worker: str) -> None:
        self._folder = folder
        self._mark = f"{_plain(endpoint)}--"
        self._path = folder / f"{self._mark}{_plain(worker)}.json"
        self._before = _read(self._path) or _Series(0, _now(), "")
        self._over = False

    def begin(self, log: logging.Logger) -> None:
        """Count this start as failed until it is known to be good; tell of those before it."""
        before = self._before
        self._write(_Series(before.failed + 1, before.since, ""))
        # Of another's start without a reason nobody knows whether it has ended.
        others = sum(series.failed - (not series.reason) for series in self._others())
        elsewhere = f"; {others} on other workers of this endpoint" if others else ""
        if before.failed:
            reason = before.reason or SILENT
            log.log(
                logging.ERROR if before.failed >= OFTEN else logging.WARNING,
                "%s%s; the last one: %s",
                _times(before, "before this one"),
                elsewhere,
                reason,
            )
        elif others >= OFTEN:
            log.warning("%d starts have failed on other workers of this endpoint", others)

    def keep_reason(self, reason: str, log: logging.Logger) -> None:
        """Keep why this start failed, unless it was good; an error in the log from OFTEN on."""
        if self._over:
            return
        series = _Series(self._before.failed + 1, self._before.since, reason)
        self._write(series)
        if series.failed >= OFTEN:
            log.error(
                "%s: it will not mend itself; the settings, the volume or this machine have to "
                "change",
                _times(series, "with this one"),
            )

    def clear(self) -> None:
        """Forget what has failed before: this start is good."""
        self._over = True
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def withdraw(self) -> None:
        """Count this start, unless it was good, as none: it was told to end before it was over."""
        if self._over:
            return
        if self._before.failed:
            self._write(self._before)
        else:
            self.clear()

    def _others(self) -> list[_Series]:
        found = []
        now = time.time()
        for path in self._folder.glob(f"{self._mark}*.json"):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > FORGOTTEN_S:
                    path.unlink()
                elif path != self._path and (series := _read(path)):
                    found.append(series)
        return found

    def _write(self, series: _Series) -> None:
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # a volume that cannot be written has other faults
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(vars(series)) + "\n")
            temporary.replace(self._path)


def _times(series: _Series, which: str) -> str:
    if series.failed == 1:
        return f"the start {which} failed, once"
    count = f"{series.failed} starts in a row have failed on this worker {which}"
    return f"{count}, since {series.since}"


def _read(path: Path) -> _Series | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found: dict[str, Any] = json.loads(path.read_text())
        return _Series(int(found["failed"]), str(found["since"]), str(found["reason"]))
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:64] or "_"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
