"""Which starts did not come up: tells one that failed once from one that fails again and again.

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
class _Failing:
    """What a file says."""

    failed: int
    since: str
    reason: str


class StartAttempts:
    """The starts of this worker and of the others of its endpoint, as the volume tells them."""

    def __init__(self, folder: Path, endpoint: str, worker: str) -> None:
        self._folder = folder
        self._mark = f"{_plain(endpoint)}--"
        self._path = folder / f"{self._mark}{_plain(worker)}.json"
        self._before = _read(self._path) or _Failing(0, _now(), "")
        self._over = False

    def begin(self, log: logging.Logger) -> None:
        """Count this start as failed until it is known to be good; tell of those before it."""
        before = self._before
        self._write(_Failing(before.failed + 1, before.since, ""))
        others = sum(failing.failed for failing in self._others())
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
            log.warning("%d starts in a row have failed on other workers of this endpoint", others)

    def failed(self, reason: str, log: logging.Logger) -> None:
        """Keep why this start ended, unless it was good, and say whether it is the first so."""
        if self._over:
            return
        failing = _Failing(self._before.failed + 1, self._before.since, reason)
        self._write(failing)
        if failing.failed >= OFTEN:
            log.error(
                "%s: it will not mend itself; the settings, the volume or this machine have to "
                "change",
                _times(failing, "with this one"),
            )

    def good(self) -> None:
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
            self.good()

    def _others(self) -> list[_Failing]:
        found = []
        now = time.time()
        for path in self._folder.glob(f"{self._mark}*.json"):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > FORGOTTEN_S:
                    path.unlink()
                elif path != self._path and (failing := _read(path)):
                    found.append(failing)
        return found

    def _write(self, failing: _Failing) -> None:
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # a volume that cannot be written has other faults
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(vars(failing)) + "\n")
            temporary.replace(self._path)


def _times(failing: _Failing, which: str) -> str:
    if failing.failed == 1:
        return f"the start {which} failed, once"
    count = f"{failing.failed} starts in a row have failed on this worker {which}"
    return f"{count}, since {failing.since}"


def _read(path: Path) -> _Failing | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found: dict[str, Any] = json.loads(path.read_text())
        return _Failing(int(found["failed"]), str(found["since"]), str(found["reason"]))
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:64] or "_"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
