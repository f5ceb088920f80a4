"""What may go from a cache: what the dead left behind, and on request what nothing points to.

Finds and removes; whether anything is removed is for a person to say. Ages are told by the file
server's clock. Knows nothing of the Hub.
"""

import contextlib
import re
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from model_cache import (
    lock_folder_of,
    read_ref,
    references,
    repo_id_of,
    snapshots,
    storages,
    temporaries,
)
from model_files import size_of
from model_lease import leases, server_time, silence_s

AGE_S = 3600.0
"""How long nobody may have touched what is taken for the dead's."""
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Litter:
    """Something that may go: whose it is, what, the files and folders, and the bytes they take."""

    repo_id: str
    what: str
    paths: tuple[Path, ...]
    bytes: int = 0

    def remove(self) -> None:
        """Delete it; what is gone already is as good."""
        for path in self.paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def left_by_the_dead(cache: Path, age_s: float = AGE_S) -> Iterator[Litter]:
    """Yield unfinished downloads, locks and leases that nobody has touched for `age_s`."""
    for storage in storages(cache):
        repo_id, locks = repo_id_of(storage), lock_folder_of(storage)
        now = server_time(locks) or time.time()
        for path, stat in sorted(temporaries(storage).items()):
            if now - stat.st_mtime > age_s:
                yield Litter(repo_id, "unfinished download", (path,), stat.st_size)
        old = []
        for lock in sorted(locks.glob("*.lock")):
            with contextlib.suppress(OSError):
                if now - lock.stat().st_mtime > age_s:
                    old.append(lock)
        if old:
            yield Litter(repo_id, f"{len(old)} locks", tuple(old))
        if (silent_s := silence_s(locks)) is not None and silent_s > age_s:
            yield Litter(repo_id, "lease", tuple(leases(locks)))


def too_young(cache: Path, age_s: float = AGE_S) -> int:
    """Return how many unfinished downloads are left alone, since somebody may yet write to them."""
    count = 0
    for storage in storages(cache):
        now = server_time(lock_folder_of(storage)) or time.time()
        count += sum(now - stat.st_mtime <= age_s for stat in temporaries(storage).values())
    return count


def unused(cache: Path, kept: Collection[str], age_s: float = AGE_S) -> Iterator[Litter]:
    """Yield snapshots that no branch or tag stands for, and blobs that no snapshot links to.

    A model that was fetched by its commit looks like this too: `kept` are commits to leave alone.
    """
    for storage in storages(cache):
        repo_id = repo_id_of(storage)
        refs = {read_ref(storage, ref) for ref in references(storage)} | set(kept)
        everywhere = {sha: _blobs(storage, sha) for sha in snapshots(storage)}
        used = set().union(*(blobs for sha, blobs in everywhere.items() if sha in refs))
        freed = set(used)
        for sha, blobs in everywhere.items():
            if sha in refs:
                continue
            alone = tuple(sorted(blobs - freed))
            freed |= blobs
            folder = storage / "snapshots" / sha
            paths = (folder, storage / "trees" / f"{sha}.json", *alone)
            own_bytes = sum(size_of(path) or 0 for path in alone) + _plain_bytes(folder)
            yield Litter(repo_id, f"snapshot {sha[:7]} that no branch stands for", paths, own_bytes)
        now = server_time(lock_folder_of(storage)) or time.time()
        for blob in _lonely(storage, freed):
            with contextlib.suppress(OSError):
                # One that has just been finished is linked to in a moment.
                if now - blob.lstat().st_mtime > age_s:
                    what = f"file {blob.name[:7]} that no snapshot has"
                    yield Litter(repo_id, what, (blob,), size_of(blob) or 0)


def _blobs(storage: Path, sha: str) -> set[Path]:
    """Return the blobs to which a snapshot links."""
    found = set()
    blobs = storage / "blobs"
    for pointer in (storage / "snapshots" / sha).rglob("*"):
        if pointer.is_symlink():
            target = pointer.parent / pointer.readlink()
            # However the way to the cache is written: what is missed here counts as litter.
            if target.parent.resolve() == blobs.resolve():
                found.add(blobs / target.name)
    return found


def _plain_bytes(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(size_of(path) or 0 for path in files)


def _lonely(storage: Path, linked: Collection[Path]) -> Iterator[Path]:
    for blob in sorted((storage / "blobs").glob("*")):
        if _BLOB.fullmatch(blob.name) and blob not in linked:
            yield blob
