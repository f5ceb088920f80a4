"""How far a download is: measured by its files on disk, told to people in the log.

Whoever downloads and whoever waits for another's download measure the same way. Decides nothing.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model_cache import temporaries
from model_files import human_size, size_of

# A download of an hour is told in some sixty lines, one of ten seconds in two.
_TOLD_SHARE = 1 / 10
_TOLD_AT_LEAST_EVERY_S = 120.0


@dataclass(frozen=True)
class Manifest:
    """What is to be there at the end: the commit, and the needed files with their sizes."""

    sha: str
    sizes: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all needed files."""
        return sum(self.sizes.values())

    def finished_bytes(self, storage: Path) -> int:
        """Bytes of those needed files that are whole in a repository's folder of the cache."""
        folder = storage / "snapshots" / self.sha
        return sum(size for file, size in self.sizes.items() if size_of(folder / file) == size)


class Progress:
    """Measures a download and logs it, first at most every `every_s`, then less and less often.

    `label` opens each line: the model's name, and who downloads it where that is another.
    """

    def __init__(self, label: str, storage: Path, every_s: float, log: logging.Logger) -> None:
        self._label, self._storage, self._every_s, self._log = label, storage, every_s, log
        self._manifest: Manifest | None = None
        self._foreign: set[Path] = set()
        self._had = 0
        self._began_at = self._told_at = time.monotonic()

    def ignore_unfinished(self) -> None:
        """Count no file as this download's that is there, unfinished, before it begins."""
        self._foreign = set(temporaries(self._storage))

    def begin(self, manifest: Manifest) -> None:
        """Measure towards a manifest from now on."""
        self._manifest = manifest
        self._had = self._have(temporaries_too=True)
        self._began_at = self._told_at = time.monotonic()

    def tell_manifest(self) -> None:
        """Log what is to be downloaded."""
        if self._manifest is not None:
            # config.json has just been fetched, for the listing's sake.
            told = self._had > self._manifest.sizes.get("config.json", 0)
            self._log.info(
                "%s: downloading %d files, %s%s (revision %.7s)",
                self._label,
                len(self._manifest.sizes),
                human_size(self._manifest.total),
                f", of which {human_size(self._had)} are here" if told else "",
                self._manifest.sha,
            )

    def measure(self) -> tuple[int, int]:
        """Return the bytes finished and under way, by whatever process; log them when due."""
        now = time.monotonic()
        due_s = min(_TOLD_AT_LEAST_EVERY_S, (now - self._began_at) * _TOLD_SHARE)
        if self._manifest is not None and now - self._told_at >= max(self._every_s, due_s):
            self._told_at = now
            total = self._manifest.total
            have = min(total, self._have(temporaries_too=True))
            rate = max(0.0, (have - self._had) / (now - self._began_at))
            left = f"{(total - have) / rate:.0f} s left" if rate > 0 else "waiting for data"
            self._log.info(
                "%s: %d %% of %s, %.1f MB/s, %s",
                self._label,
                100 * have // max(1, total),
                human_size(total),
                rate / 1e6,
                left,
            )
        under_way = sum(stat.st_size for stat in temporaries(self._storage).values())
        return self._have(temporaries_too=False), under_way

    def end(self) -> None:
        """Log what a finished download has brought."""
        took_s = max(1e-3, time.monotonic() - self._began_at)
        got = self._have(temporaries_too=False) - self._had
        self._log.info(
            "%s: downloaded %s in %.1f s, %.1f MB/s",
            self._label,
            human_size(got),
            took_s,
            got / took_s / 1e6,
        )

    def _have(self, *, temporaries_too: bool) -> int:
        if self._manifest is None:
            return 0
        folder = self._storage / "snapshots" / self._manifest.sha
        finished = sum(size_of(folder / file) or 0 for file in self._manifest.sizes)
        under_way = temporaries(self._storage).items() if temporaries_too else ()
        return finished + sum(s.st_size for path, s in under_way if path not in self._foreign)
