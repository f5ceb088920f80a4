"""What a process of the worker leaves for others to look at: nothing where that can be had.

Owns that no other process may read this one's memory, that it leaves no core file, and the folder
of its temporary files, which lies in memory and is gone with it. Knows nothing of engines, of logs
and of the platform.
"""

import contextlib
import fcntl
import os
import resource
import shutil
import sys
import tempfile
from ctypes import CDLL
from pathlib import Path
from typing import Any

_PR_SET_DUMPABLE = 4
_libc: Any = CDLL(None)

MEMORY = Path("/dev/shm")  # noqa: S108 - what is made there is this process's alone

ROOM_BYTES = 2**30
"""With less room left in memory the disk is used: some containers have 64 MB, for everything."""

_PREFIX = "sv-"
# A socket's whole path may have 107 characters; vLLM's are named by 36 in a folder named by 11.
_MAX_PARENT_CHARS = 107 - len("/") - 36 - len("/") - 11
_LOCK = "lock"
_DISK = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - as for MEMORY


def seal_off() -> None:
    """Leave no core file, and let no other process look into this one.

    The kernel then refuses /proc/PID/environ, /proc/PID/mem and debuggers to everybody without
    CAP_SYS_PTRACE or CAP_PERFMON, root included; containers have these only where they are asked
    for. A fork is sealed off too; a process that is started anew has to do it itself.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


class TemporaryFolder:
    """A folder of this process and its children alone; `remove` it at the end.

    What a worker that was killed has left behind is removed by the next one.
    """

    def __init__(self, chosen: str | None = None) -> None:
        """Make one in the folder `chosen`, else in memory where there is room, else on the disk.

        A folder is passed over that is none, or whose path is too long for the sockets that come
        to lie in it.
        """
        parent = Path(chosen) if chosen and _fits(Path(chosen)) else _parent()
        _sweep(parent)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            # Children inherit the lock: while one of them lives, so does the folder.
            self._lock = (self.path / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self.path.exists():  # until it was locked, it looked like one of the dead
                return
            self._lock.close()

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _parent() -> Path:
    with contextlib.suppress(OSError):
        if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM_BYTES:
            return MEMORY
    # Not by TMPDIR once more, which was passed over if it is set.
    return next(filter(_fits, _DISK), Path.cwd())


def _fits(folder: Path) -> bool:
    return folder.is_dir() and len(os.fsencode(folder)) <= _MAX_PARENT_CHARS


def _sweep(parent: Path) -> None:
    """Remove the folders of workers of which no process lives any more."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        if lock.is_symlink() or lock.parent.is_symlink():
            continue  # no worker makes such
        with contextlib.suppress(OSError), lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
