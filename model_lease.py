"""Whose turn it is: a lease on one repository of a cache that many workers share.

Advisory. A network volume gives no lock that survives its holder, so nothing here may be needed
for the files to come out right: two who both believe to hold a lease download twice, no more. A
lease is a file, `lease.N`; the highest N counts, and creating it (O_EXCL) is the one step that has
to be atomic. Its holder touches it; one that stays untouched is succeeded by `lease.N+1`, which
is how a holder that had only been asleep notices.

Hosts' clocks differ, so the age of a file is told by another one that is touched now: on a network
volume both times are the file server's. Where they are not, watching for a change decides.

Knows nothing of models and downloads.
"""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

_NAME = re.compile(r"lease\.(\d+)")
_CLOCK = "lease.clock"
# No two hosts' clocks are this many times the patience with a silent holder apart.
_BEYOND_DOUBT = 10


@dataclass(frozen=True)
class Pace:
    """How often a holder shows that it lives, and after how long a silence it is dead."""

    heartbeat_s: float = 2.0
    stale_s: float = 20.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. `worker` is the platform's name for it, where there is one."""

    host: str
    pid: int
    worker: str = ""
    nonce: str = ""

    @classmethod
    def here(cls, worker: str = "") -> "Holder":
        """Return this process as a holder to be."""
        return cls(socket.gethostname(), os.getpid(), worker, uuid.uuid4().hex)

    def __str__(self) -> str:
        who = f"worker {self.worker}" if self.worker else "a process"
        return f"{who} on {self.host} (pid {self.pid})"


UNKNOWN = Holder("an unknown host", 0)


class Lease:
    """A lease that was taken; a thread keeps it fresh until it is released or lost.

    Without a `path` it protects nothing: where no lease can be written, everybody goes on alone.
    """

    def __init__(self, path: Path | None, holder: Holder, pace: Pace) -> None:
        self._path, self._holder, self._pace = path, holder, pace
        self._ended = threading.Event()
        self._lost = False
        self.succeeds = path is not None and _number(path) > 1
        """Whether it was taken over, so that its last holder's work may lie about."""
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        if path is not None:
            self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another one has taken over, so that this one must stop."""
        return self._lost

    def release(self) -> None:
        """Give the lease back, if it is still this one's."""
        self._ended.set()
        if self._path is None:
            return
        self._thread.join(self._pace.stale_s)
        with contextlib.suppress(OSError):
            if not self._lost and self._is_mine(self._path):
                # Dead predecessors go first: after the own file, theirs would count again.
                for path in leases(self._path.parent):
                    if _number(path) <= _number(self._path):
                        path.unlink(missing_ok=True)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while self._path is not None and not self._ended.wait(self._pace.heartbeat_s):
            # An error of the file system says nothing of others; they will see, and so will this.
            with contextlib.suppress(OSError):
                if not self._is_mine(self._path):
                    self._lost = True
                    return
                os.utime(self._path)

    def _is_mine(self, path: Path) -> bool:
        return leases(path.parent)[-1:] == [path] and holder_of(path) == self._holder


class Claim:
    """One process's wish for the lease in a folder; ask again and again until it is granted."""

    def __init__(self, folder: Path, worker: str, pace: Pace, log: logging.Logger) -> None:
        self._folder, self._worker, self._pace, self._log = folder, worker, pace, log
        self.holder = UNKNOWN
        """Who had the lease when it was not granted."""
        self._seen: tuple[str, int, int] | None = None
        self._looked_at = self._unchanged_s = 0.0

    def take(self, *, even_from_the_living: bool = False) -> Lease | None:
        """Return the lease if it is free or its holder is dead, else None; never waits.

        One taken from the living is lost to them at their next heartbeat.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            held = leases(self._folder)
            if not held:
                return self._create(1)
            self.holder = holder_of(held[-1])
            try:
                dead = self._is_dead(held[-1])
            except FileNotFoundError:  # released between two looks
                return None
            if not dead and not even_from_the_living:
                return None
            lease = self._create(_number(held[-1]) + 1)
            if lease is not None:
                why = "no longer shows that it lives" if dead else "brings nothing"
                self._log.warning("%s %s; taking over", self.holder, why)
            return lease
        # A missing file is no exception: some file systems, procfs among them, refuse with it.
        except OSError as error:
            self._log.debug("no lease in %s: %s", self._folder, error)
            return Lease(None, Holder.here(self._worker), self._pace)

    def _create(self, number: int) -> Lease | None:
        path, holder = self._folder / f"lease.{number}", Holder.here(self._worker)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return None
        try:
            os.write(file, json.dumps(asdict(holder)).encode())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        return Lease(path, holder, self._pace)

    def _is_dead(self, path: Path) -> bool:
        stat = path.lstat()  # of a link to nothing, too: it must not be waited for
        seen = (path.name, stat.st_ino, stat.st_mtime_ns)
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._unchanged_s = seen, 0.0
        else:
            # While this process or the volume stood still, nothing was watched.
            self._unchanged_s += min(now - self._looked_at, self._pace.heartbeat_s)
        self._looked_at = now
        stale_s, beats_s = self._pace.stale_s, 2 * self._pace.heartbeat_s
        age_s = (server_time(self._folder) or stat.st_mtime) - stat.st_mtime
        return (
            age_s > _BEYOND_DOUBT * stale_s
            or (age_s > stale_s and self._unchanged_s >= beats_s)
            or self._unchanged_s >= stale_s
        )


def leases(folder: Path) -> list[Path]:
    """Return the leases in a folder, the one that counts last."""
    try:
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.rpartition(".")[2])


def holder_of(path: Path) -> Holder:
    """Return who a lease names; UNKNOWN where it is being written, or is none."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return UNKNOWN


def silence_s(folder: Path) -> float | None:
    """Return for how long the holder in a folder has not shown that it lives; None without one."""
    try:
        mtime = leases(folder)[-1].lstat().st_mtime
    except (IndexError, FileNotFoundError):
        return None
    return max(0.0, (server_time(folder) or time.time()) - mtime)


def take_away(folder: Path) -> Holder | None:
    """Remove the lease in a folder, for a person who knows better; return whose it was.

    A living holder loses it at its next heartbeat, stops and asks for it anew.
    """
    held = leases(folder)
    holder = holder_of(held[-1]) if held else None
    for path in held:
        path.unlink(missing_ok=True)
    return holder


def server_time(folder: Path) -> float | None:
    """Return the time by the clock that stamps the files of a folder; None where none can be."""
    clock = folder / _CLOCK
    try:
        clock.touch()
        return clock.stat().st_mtime
    except OSError:
        return None
