"""Whether files hold what the Hub has: SHA-256 and git's SHA-1, by several threads.

The Hub library hashes nothing of what it downloads over HTTP, so a flipped bit passes every other
check. Which hash a file must have is said by `model_cache`.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from model_files import human_size, size_of

_THREADS = 4
_PIECE_BYTES = 4 * 1024 * 1024


def check_hashes(
    folder: Path, hashes: Mapping[str, str], label: str, every_s: float, log: logging.Logger
) -> dict[str, str]:
    """Return which of the files do not have their hash, as file → reason; progress goes to the log.

    40 hex digits are git's SHA-1 of a file, 64 its SHA-256.
    """
    progress = _Progress(label, sum(size_of(folder / file) or 0 for file in hashes), every_s, log)
    ended = threading.Event()
    with ThreadPoolExecutor(_THREADS) as pool:
        work: dict[Future[str | None], str] = {
            pool.submit(_fault, folder / file, expected, progress, ended): file
            for file, expected in hashes.items()
        }
        try:
            waiting = set(work)
            while waiting:
                _, waiting = wait(waiting, timeout=every_s)
                progress.tell()
        finally:
            ended.set()
    return {file: reason for future, file in work.items() if (reason := future.result())}


def _fault(path: Path, expected: str, progress: "_Progress", ended: threading.Event) -> str | None:
    try:
        with path.open("rb") as file:
            if len(expected) == 40:
                digest = hashlib.sha1(usedforsecurity=False)
                digest.update(b"blob %d\0" % (size_of(path) or 0))
            else:
                digest = hashlib.sha256()
            while not ended.is_set() and (piece := file.read(_PIECE_BYTES)):
                digest.update(piece)
                progress.add(len(piece))
    except OSError as error:
        return f"unreadable ({error.strerror})"
    if (found := digest.hexdigest()) == expected:
        return None
    return f"its {'SHA-256' if len(expected) == 64 else 'git hash'} is {found}, not {expected}"


class _Progress:
    """Counts what the threads have read."""

    def __init__(self, label: str, total: int, every_s: float, log: logging.Logger) -> None:
        self._label, self._total, self._every_s, self._log = label, total, every_s, log
        self._lock = threading.Lock()
        self._bytes = 0
        self._began_at = self._told_at = time.monotonic()

    def add(self, count: int) -> None:
        with self._lock:
            self._bytes += count

    def tell(self) -> None:
        """Log how far it is, when due."""
        now = time.monotonic()
        if now - self._told_at < self._every_s:
            return
        self._told_at = now
        rate = self._bytes / (now - self._began_at)
        self._log.info(
            "%s: %d %% of %s read, %.1f MB/s, %.0f s left",
            self._label,
            100 * self._bytes // max(1, self._total),
            human_size(self._total),
            rate / 1e6,
            (self._total - self._bytes) / max(1.0, rate),
        )
