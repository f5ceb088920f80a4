"""What the engine compiles: kept on local disk, carried from worker to worker by the volume.

    start: claim a local folder → hydrate it from the volume's archive → the engine
    ready: publish what it has compiled since, if no other worker was faster

Owns the local folder, when an archive is read, written and removed, and what the log
says of it. Nothing here stops a worker: what cannot be used is ignored, and the engine
compiles as if it had not been there. Knows nothing of the archive's inside
(compile_archive.py) or of what the key is made of (compile_key.py).
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import compile_archive
from compile_archive import PART_SUFFIX, Unusable

KEPT_ARCHIVES = 8
"""How many archives of one model stay on the volume: one for each kind of machine and settings."""

STALE_PART_S = 3600
"""After this long a file that is still being written was left behind by a worker that ended."""

_ENVIRONMENT = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
}
# Not all of vLLM's folder: there it also notes how one host's GPUs are connected, and downloads.
_ARTEFACTS = (
    "vllm/torch_compile_cache",
    "vllm/modelinfos",
    "vllm/deep_gemm",
    "vllm/flashinfer_autotune_cache",
    "inductor",
    "triton",
)
_READY = "ready"

# What vLLM has found out about its own classes of models; it looks after their validity itself, by
# a hash of their source. Without it a start inspects the model's class in a process of its own,
# which imports vLLM anew: it is kept whatever else is thrown away.
_KEPT = "vllm/modelinfos"

Files = dict[str, int]
"""Size in bytes by name."""


@dataclass(frozen=True)
class Hydrated:
    """What a start found: artefacts still on the local disk, or those of the volume's archive."""

    source: Literal["disk", "volume"]
    files: int
    bytes: int
    took_s: float


@dataclass(frozen=True)
class Published:
    """What was put on the volume."""

    files: int
    bytes: int
    took_s: float


class LocalFolder:
    """A folder of this process's own for as long as it and its forked children live.

    The same one at each start, where no other process has it: paths go into some of
    the artefacts.
    """

    def __init__(self, parent: Path) -> None:
        """Claim the first free folder below `parent`; OSError if none can be made."""
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in itertools.count():
            self.path = parent / str(number)
            self._lock = os.open(parent / f"{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                continue
            self.path.mkdir(mode=0o700, exist_ok=True)
            return

    def environment(self) -> dict[str, str]:
        """Return what has to stand in the environment when vLLM is imported."""
        return {name: str(self.path / part) for name, part in _ENVIRONMENT.items()}

    def release(self) -> None:
        """Let other processes have the folder."""
        os.close(self._lock)


class CompileCache:
    """The artefacts for one key: `hydrate` before the engine starts, `publish` when it is ready."""

    def __init__(
        self,
        local: Path,
        volume: Path,
        key: Mapping[str, str],
        secrets: Sequence[bytes],
        *,
        kept_archives: int = KEPT_ARCHIVES,
    ) -> None:
        """`key["model"]` names the model; archives are sealed with the first of `secrets`."""
        self._local = local
        self._key = dict(key)
        self._secrets = tuple(secrets)
        self._kept_archives = kept_archives
        self._digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        self._folder = volume / re.sub(r"[^A-Za-z0-9._-]+", "--", self._key["model"]).strip(".-")
        self.archive = self._folder / f"{self._digest[:32]}.tar"
        self._before: Files = {}
        self._seal: bytes | None = None
        self._usable = False

    def hydrate(self, log: logging.Logger) -> Hydrated | None:
        """Fill the local folder; None if there is nothing to fill it with.

        What is there of an earlier start is kept if that start came to its end with the
        same key.
        """
        started = time.perf_counter()
        self._seal = compile_archive.seal_of(self.archive)
        hydrated = None
        try:
            if self._taken_over():
                self._usable = self._seal is not None
                self._before = self._files()
                size = sum(self._before.values())
                hydrated = Hydrated("disk", len(self._before), size, _since(started))
            else:
                count, size = self._unpack()
                self._usable = True
                self._before = self._files()
                hydrated = Hydrated("volume", count, size, _since(started))
        except FileNotFoundError:
            log.info("compile cache: nothing yet for this model, these settings and this machine")
        except (OSError, Unusable) as error:
            log.warning("compile cache: ignored %s: %s", self.archive, error)
        if hydrated:
            log.info(
                "compile cache: %d files, %.1f MB, from the %s in %.2f s",
                hydrated.files,
                hydrated.bytes / 1e6,
                hydrated.source,
                hydrated.took_s,
            )
        return hydrated

    def publish(self, log: logging.Logger) -> Published | None:
        """Put what the engine has compiled on the volume, if that is more than was there.

        Call when the engine is ready, in a thread: it reads and writes all of it.
        """
        started = time.perf_counter()
        try:
            files = self._files()
            (self._local / _READY).write_text(self._digest)
            if not files or (self._usable and files == self._before):
                return None
            if compile_archive.seal_of(self.archive) != self._seal:
                return None  # of workers that began together the first publishes
            self._folder.mkdir(parents=True, exist_ok=True)
            size = compile_archive.write(
                self.archive, self._local, sorted(files), self._key, self._secrets[0]
            )
            self._tidy()
        except (OSError, Unusable) as error:
            log.warning("compile cache: not published to %s: %s", self._folder, error)
            return None
        self._before, self._usable = files, True
        self._seal = compile_archive.seal_of(self.archive)
        published = Published(len(files), size, _since(started))
        log.info(
            "compile cache: published %d files, %.1f MB, in %.2f s",
            published.files,
            published.bytes / 1e6,
            published.took_s,
        )
        return published

    def _taken_over(self) -> bool:
        """Whether the folder holds what an engine with the same key was ready with.

        The sign is taken away until this one is ready too: a start that fails is not repeated
        with what it has left behind.
        """
        sign = self._local / _READY
        try:
            same = sign.read_text() == self._digest
            sign.unlink()
        except FileNotFoundError:
            return False
        return same

    def _unpack(self) -> tuple[int, int]:
        self._empty()
        try:
            found = compile_archive.extract(self.archive, self._local, self._key, self._secrets)
        except BaseException:
            self._empty()
            raise
        with contextlib.suppress(OSError):
            os.utime(self.archive)  # it is in use: others are removed before it
        return found

    def _empty(self) -> None:
        kept = self._local / _KEPT
        for entry in (*self._local.iterdir(), *kept.parent.glob("*")):
            if entry in (kept, kept.parent):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _files(self) -> Files:
        """Return the artefacts: regular files of certain folders."""
        found = {}
        for part in _ARTEFACTS:
            for folder, _, names in os.walk(self._local / part):
                for name in names:
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):  # a temporary file of inductor's
                        if path.is_file() and not path.is_symlink():
                            found[str(path.relative_to(self._local))] = path.stat().st_size
        return found

    def _tidy(self) -> None:
        """Remove archives past the newest few, and what ended workers were writing."""
        by_age = sorted(self._folder.glob("*.tar"), key=_mtime, reverse=True)
        now = time.time()
        stale = [
            part
            for part in self._folder.glob(f".*{PART_SUFFIX}")
            if now - _mtime(part) > STALE_PART_S
        ]
        for path in (*by_age[self._kept_archives :], *stale):
            path.unlink(missing_ok=True)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another worker has removed it
        return 0.0


def _since(started: float) -> float:
    return time.perf_counter() - started
