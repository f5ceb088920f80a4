"""Model snapshots: from a name in MODELS to a folder of complete files that the engine can load.

Owns where a model is looked for, what makes its files complete, and how they are downloaded
into the cache on the volume. Knows nothing of the engine, of keys or of the environment:
settings arrive as arguments. `huggingface_hub` is imported inside functions only, because it
freezes HF_HOME and its other settings when it is first imported.

The order: MODEL_PATH, a local folder, the cache on the volume, RunPod's cached-model location,
the Hub. A complete model in any of the first four is used without a single network call.

A download runs in a child process (this file as a script, its job on stdin): the Hub library
cannot be interrupted from within, and a child that receives no bytes any more can be killed.
"""

import contextlib
import errno
import fnmatch
import json
import logging
import os
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from errors import (
    DiskFull,
    ModelError,
    ModelGated,
    ModelIncomplete,
    ModelNotFound,
    ModelOffline,
)

RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
"""Where RunPod places the models of its cached-model feature, in the layout of the Hub's cache."""

HUB = "https://huggingface.co"

Source = Literal["MODEL_PATH", "folder", "cache", "runpod cache", "hub"]

# What an engine reads besides weights, and what it never reads although the name fits.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
SKIPPED = ("original/*", "onnx/*", "*.onnx*", "*.h5", "*.msgpack", ".cache/*")
TRAINING_STATE = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*")
TOKENIZERS = ("tokenizer*", "vocab.*", "tekken.json", "*.tiktoken", "spiece.model")
CONFIGS = ("config.json", "params.json", "adapter_config.json")

_REPO_ID = re.compile(r"(\w[\w.-]*/)?\w([\w.-]*\w)?", re.ASCII)
_SHA = re.compile(r"[0-9a-f]{40}")
# EFBIG is what a limit on file sizes answers with; to the operator it is the same lack of room.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ORPHAN_AGE_S = 3600.0
_CHILD_START_S = 60.0


@dataclass(frozen=True)
class Snapshot:
    """A complete model on disk.

    `name` is what is served by default (the repository id, or the folder's own name), `path` the
    folder to load (the file itself for GGUF), `revision` the commit where it is known.
    """

    name: str
    path: Path
    revision: str | None
    source: Source
    bytes: int


@dataclass(frozen=True)
class Patience:
    """How long a download is believed in.

    `attempts` counts failures in a row; a file that was finished starts the count again.
    """

    attempts: int = 5
    backoff_s: float = 1.0
    stall_s: float = 60.0
    log_every_s: float = 5.0


def resolve(
    model: str,
    *,
    hub_cache: Path,
    runpod_cache: Path = RUNPOD_CACHE,
    model_path: Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    offline: bool = False,
    patience: Patience | None = None,
    log: logging.Logger | None = None,
) -> Snapshot:
    """Return the complete snapshot of `model`, downloading or repairing it where that is needed.

    `model` is a folder, a `.gguf` file, `org/name`, `org/name@revision` or `org/name/file.gguf`.
    With `model_path` only the name is taken from it. Blocks for as long as the download takes.
    Raises ModelNotFound, ModelGated, ModelOffline, ModelIncomplete, DiskFull or ModelError.
    """
    log = log or logging.getLogger(__name__)
    patience = patience or Patience()
    local = model_path or Path(model).expanduser()
    if model_path is not None or local.exists() or _is_explicit_path(model):
        source: Source = "MODEL_PATH" if model_path is not None else "folder"
        snapshot = _from_folder(local, model, source)
        log.info("%s: using %s (%s)", snapshot.name, snapshot.path, source)
        return snapshot

    repo = Repo.parse(model)
    places: list[tuple[Path, Source]] = [(hub_cache, "cache")]
    if runpod_cache != hub_cache:
        places.append((runpod_cache, "runpod cache"))
    partial: _Cached | None = None
    for cache, source in places:
        cached = _look_up(repo, cache)
        if cached is None:
            continue
        if not cached.faults:
            snapshot = cached.snapshot(repo, source)
            log.info("%s: complete in the %s, %s", repo.id, source, _size(snapshot.bytes))
            return snapshot
        log.warning("%s: incomplete in %s: %s", repo.id, cache, _listed(cached.faults))
        partial = partial or cached

    try:
        if offline:
            raise ModelOffline(
                f"{repo.id} is not complete in {hub_cache} and HF_HUB_OFFLINE is set; unset it so "
                "that the model can be downloaded, or put the model on the volume beforehand"
            )
        mine = partial if partial is not None and partial.cache == hub_cache else None
        return _download(repo, hub_cache, mine, token, endpoint, patience, log).snapshot(
            repo, "hub"
        )
    except ModelOffline as error:
        only = _only_snapshot(repo, places)
        if only is not None:
            cached, source = only
            log.warning("%s: %s; using the only cached revision, %s", repo.id, error, cached.sha)
            return cached.snapshot(repo, source)
        if partial is None:
            raise
        raise ModelIncomplete(
            f"the cached files of {repo.id} in {partial.folder} are incomplete "
            f"({_listed(partial.faults)}) and could not be repaired: {error}"
        ) from error


# ---------------------------------------------------------------- names


@dataclass(frozen=True)
class Repo:
    """A model's address on the Hub; `file` is set for a GGUF chosen by its name."""

    id: str
    revision: str = "main"
    file: str | None = None

    @classmethod
    def parse(cls, model: str) -> "Repo":
        """Read `org/name[/file.gguf][@revision]`; raises ModelNotFound for anything else."""
        address, at, revision = model.strip().removeprefix(HUB + "/").partition("@")
        file = None
        if address.lower().endswith(".gguf") and address.count("/") >= 2:
            org, name, file = address.split("/", 2)
            address = f"{org}/{name}"
        if not _REPO_ID.fullmatch(address) or "--" in address or ".." in address:
            raise ModelNotFound(
                f"{model!r} is neither a folder here nor the name of a model on the Hub; "
                "write org/name, org/name@revision or the path of a folder"
            )
        if at and (not revision or ".." in revision or revision.startswith("/")):
            raise ModelNotFound(
                f"{model!r} has no valid revision after the @; write a branch, a tag or a commit"
            )
        return cls(address, revision or "main", file)

    @property
    def storage_name(self) -> str:
        """Name of the repository's folder in the Hub's cache."""
        return "models--" + self.id.replace("/", "--")


def _is_explicit_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..")


def _from_folder(path: Path, model: str, source: Source) -> Snapshot:
    path = path.expanduser()
    if not path.exists():
        raise ModelNotFound(
            f"{source if source == 'MODEL_PATH' else 'the model folder'} {path} does not exist; "
            "check the path and that the volume is attached"
        )
    revision = None
    if (path / "snapshots").is_dir():
        revision = _ref(path, "main") or next(iter(_snapshots(path)), None)
        path = path / "snapshots" / revision if revision else path
    if path.is_file():
        faults = {path.name: reason} if (reason := _file_fault(path)) else {}
        total = path.stat().st_size
    else:
        faults = check(path)
        total = sum(_bytes(path / file) or 0 for file in select_files(_listing(path)))
    if faults:
        raise ModelIncomplete(
            f"the model in {path} is incomplete: {_listed(faults)}; copy these files again, "
            "or name a repository of the Hub instead"
        )
    same = source == "folder" or _is_explicit_path(model) or Path(model).exists()
    name = path.resolve().name if same else Repo.parse(model).id
    return Snapshot(name, path, revision, source, total)


# ---------------------------------------------------------------- which files, and are they whole


def select_files(files: Iterable[str], gguf: str | None = None) -> list[str]:
    """Return those of a model's files that the engine needs, sorted.

    Weights are safetensors where there are any, else `.bin`, else `.pt`; `consolidated*` only
    where nothing else holds the weights; GGUF only where `gguf` names the file.
    """
    rest = [f for f in files if not _matches(f, SKIPPED)]
    side = {f for f in rest if _matches(f, SIDE_FILES)}
    return sorted(side | set(_weights(rest, gguf)))


def _weights(files: Sequence[str], gguf: str | None) -> list[str]:
    if gguf is not None:
        return [f for f in files if f == gguf]
    usable = [f for f in files if not _matches(f, (*SKIPPED, *TRAINING_STATE))]
    for suffix in (".safetensors", ".bin", ".pt"):
        fitting = [f for f in usable if f.endswith(suffix)]
        plain = [f for f in fitting if not Path(f).name.startswith("consolidated")]
        if fitting:
            return plain or fitting
    return []


def _matches(file: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def check(
    folder: Path, sizes: Mapping[str, int] | None = None, gguf: str | None = None
) -> dict[str, str]:
    """Return what is wrong with a model's files, as file → reason; empty means complete.

    `sizes` are the sizes in bytes that the Hub gives for the needed files. Without them the files
    are judged by themselves: shards named by an index, the length in a safetensors header.
    Reads headers and indexes only, never the weights.
    """
    if sizes is not None:
        faults = {
            file: reason
            for file, size in sizes.items()
            if (reason := _size_fault(folder / file, size))
        }
        return faults or _absences(sizes, gguf)
    files = _listing(folder)
    needed = select_files(files, gguf)
    faults = {file: reason for file in needed if (reason := _file_fault(folder / file))}
    for index in (f for f in needed if f.endswith(".index.json") and f not in faults):
        # An index of weights that were passed over (.bin beside safetensors) binds nobody.
        shards = _shards(folder / index)
        if shards & set(_weights([*files, *shards], gguf)):
            faults |= {shard: "missing" for shard in shards - set(files)}
    return faults or _absences(needed, gguf)


def _absences(files: Iterable[str], gguf: str | None) -> dict[str, str]:
    files = list(files)
    faults = {}
    if not _weights(files, gguf):
        faults[gguf or "weights (.safetensors, .bin or .pt)"] = "missing"
    if gguf is None and not any(config in files for config in CONFIGS):
        faults["config.json"] = "missing"
    return faults


def _listing(folder: Path) -> list[str]:
    """Every file below `folder` as a relative name, dangling links included."""
    names = []
    for parent, _, files in os.walk(folder, followlinks=True):
        names += [(Path(parent) / file).relative_to(folder).as_posix() for file in files]
    return sorted(names)


def _bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _size_fault(path: Path, size: int) -> str | None:
    found = _bytes(path)
    if found is None:
        return "dangling link" if path.is_symlink() else "missing"
    return None if found == size else f"{found} of {size} bytes"


def _file_fault(path: Path) -> str | None:
    size = _bytes(path)
    if size is None:
        return "dangling link" if path.is_symlink() else "missing"
    name = path.name
    if size == 0 and not name.endswith((".py", ".txt")):
        return "empty"
    try:
        if name.endswith(".safetensors"):
            return _safetensors_fault(path, size)
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(max(0, size - 64))
            end = file.read().rstrip()[-1:]
        if name.endswith(".gguf") and start != b"GGUF":
            return "not a GGUF file"
        if name.endswith((".bin", ".pt")) and start == b"PK\x03\x04":
            return None if zipfile.is_zipfile(path) else "truncated"
        if name.endswith(".json"):
            if name in CONFIGS or name.endswith(".index.json"):
                json.loads(path.read_bytes())
            elif end not in (b"}", b"]"):
                return "truncated"
    except ValueError:
        return "not JSON"
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return None


def _safetensors_fault(path: Path, size: int) -> str | None:
    """Format: 8 bytes little-endian header length, JSON header, data (safetensors 0.4 to 0.8)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            return f"truncated at {size} bytes"
        try:
            header = json.loads(file.read(length))
            ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "not a safetensors file"
    return None if size == expected else f"{size} of {expected} bytes"


def _shards(index: Path) -> set[str]:
    folder = index.parent
    weight_map = json.loads(index.read_bytes()).get("weight_map", {})
    top = next((p for p in (folder, *folder.parents) if (p / "config.json").exists()), folder)
    return {(folder / shard).relative_to(top).as_posix() for shard in set(weight_map.values())}


# ---------------------------------------------------------------- the cache


@dataclass(frozen=True)
class _Cached:
    """A repository's revision in one cache, whole or not."""

    cache: Path
    folder: Path
    sha: str
    sizes: Mapping[str, int] | None
    faults: Mapping[str, str]

    def snapshot(self, repo: Repo, source: Source) -> Snapshot:
        files = select_files(_listing(self.folder), repo.file)
        total = sum(_bytes(self.folder / file) or 0 for file in files)
        path = self.folder / repo.file if repo.file else self.folder
        return Snapshot(repo.id, path, self.sha, source, total)


def _look_up(repo: Repo, cache: Path, sha: str | None = None) -> _Cached | None:
    storage = cache / repo.storage_name
    sha = sha or _ref(storage, repo.revision)
    if sha is None or not (storage / "snapshots" / sha).is_dir():
        return None
    folder = storage / "snapshots" / sha
    sizes = _recorded_sizes(repo, cache, sha)
    faults = check(folder, sizes, repo.file)
    if not faults and sizes is None and repo.file is None:
        # Without the Hub's listing an interrupted download shows only in what it did not reach.
        names = [Path(file).name for file in _listing(folder)]
        adapter = "adapter_config.json" in names and "config.json" not in names
        if not adapter and not any(_matches(name, TOKENIZERS) for name in names):
            faults = {"tokenizer": "missing"}
    return _Cached(cache, folder, sha, sizes, faults)


def _ref(storage: Path, revision: str) -> str | None:
    if _SHA.fullmatch(revision):
        return revision
    try:
        sha = (storage / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return sha if _SHA.fullmatch(sha) else None


def _snapshots(storage: Path) -> list[str]:
    try:
        return sorted(p.name for p in (storage / "snapshots").iterdir() if _SHA.fullmatch(p.name))
    except OSError:
        return []


def _recorded_sizes(repo: Repo, cache: Path, sha: str) -> dict[str, int] | None:
    """Sizes of the needed files as huggingface_hub recorded them in `trees/<sha>.json`."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(repo.id, revision=sha, cache_dir=cache)
    except (CachedRepoTreeNotFoundError, OSError):
        return None
    sizes = {file.path: file.size for file in tree}
    return {file: sizes[file] for file in select_files(sizes, repo.file)}


def _only_snapshot(
    repo: Repo, places: Sequence[tuple[Path, Source]]
) -> tuple[_Cached, Source] | None:
    """A model fetched by commit leaves no branch behind; offline its one snapshot will do."""
    if repo.revision != "main":
        return None
    for cache, source in places:
        storage = cache / repo.storage_name
        shas = _snapshots(storage)
        if _ref(storage, "main") is None and len(shas) == 1:
            cached = _look_up(repo, cache, shas[0])
            if cached is not None and not cached.faults:
                return cached, source
    return None


def _remove_damaged(cached: _Cached, log: logging.Logger) -> None:
    """Delete what the Hub library would take for good: it asks only whether a file exists."""
    blobs = (cached.cache / cached.folder.parent.parent.name / "blobs").resolve()
    for file, reason in cached.faults.items():
        pointer = cached.folder / file
        if not os.path.lexists(pointer):
            continue
        if pointer.is_symlink():
            blob = (pointer.parent / pointer.readlink()).absolute()
            if Path(os.path.normpath(blob)).parent.resolve() == blobs:
                blob.unlink(missing_ok=True)
        pointer.unlink(missing_ok=True)
        log.info("removed %s (%s)", file, reason)


# ---------------------------------------------------------------- the download


@dataclass(frozen=True)
class _Failure:
    kind: str
    detail: str = ""
    retry_after_s: float = 0.0

    @property
    def deserves_retry(self) -> bool:
        return self.kind in ("network", "busy", "stalled", "died", "incomplete")


@dataclass(frozen=True)
class _Plan:
    sha: str
    sizes: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def _download(
    repo: Repo,
    hub_cache: Path,
    partial: _Cached | None,
    token: str | None,
    endpoint: str | None,
    patience: Patience,
    log: logging.Logger,
) -> _Cached:
    # The revision that is already half there is completed, even if its branch has moved on.
    revision = partial.sha if partial else repo.revision
    storage = hub_cache / repo.storage_name
    _remove_orphans(storage, log)
    failures, most = 0, -1
    damaged = partial
    while True:
        if damaged is not None:
            _remove_damaged(damaged, log)
        job = {
            "repo": repo.id,
            "revision": revision,
            "file": repo.file,
            "cache_dir": str(hub_cache),
            "token": token,
            "endpoint": endpoint,
        }
        plan, failure = _attempt(job, storage, patience, log)
        damaged = _look_up(repo, hub_cache, plan.sha) if plan else None
        if failure is None and damaged is not None:
            if not damaged.faults:
                return damaged
            failure = _Failure("incomplete", _listed(damaged.faults))
        failure = failure or _Failure("died", "the download ended without a snapshot")
        if failure.kind in ("revision", "entry") and revision != repo.revision:
            revision = repo.revision
            continue
        finished = _finished_bytes(storage, plan)
        failures = 1 if finished > most else failures + 1
        most = max(most, finished)
        if not failure.deserves_retry or failures >= patience.attempts:
            raise _error(repo, hub_cache, storage, plan, failure, failures, token, endpoint)
        if failure.kind == "stalled":
            _remove_locks(hub_cache, repo)
        wait_s = max(failure.retry_after_s, patience.backoff_s * 2 ** (failures - 1))
        wait_s *= 1 + random.random() / 4  # noqa: S311 - spreads the workers, guards nothing
        log.warning(
            "%s: %s; trying again in %.1f s (%d of %d)",
            repo.id,
            _explained(failure, token),
            wait_s,
            failures,
            patience.attempts - 1,
        )
        time.sleep(wait_s)


def _finished_bytes(storage: Path, plan: _Plan | None) -> int:
    if plan is None:
        return 0
    folder = storage / "snapshots" / plan.sha
    return sum(size for file, size in plan.sizes.items() if _bytes(folder / file) == size)


def _attempt(
    job: Mapping[str, Any], storage: Path, patience: Patience, log: logging.Logger
) -> tuple[_Plan | None, _Failure | None]:
    """Run one download in a child process and watch over it."""
    plan: _Plan | None = None
    failure: _Failure | None = None
    done = False
    progress = _Progress(str(job["repo"]), storage, patience.log_every_s, log)
    allowance_s = max(_CHILD_START_S, patience.stall_s)
    poll_s = min(1.0, patience.stall_s / 4, patience.log_every_s)
    with tempfile.TemporaryFile() as stderr, _child(stderr) as (child, messages):
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(job), file=child.stdin, flush=True)
        moved_at = time.monotonic()
        seen: object = None
        while True:
            try:
                message = messages.get(timeout=poll_s)
            except queue.Empty:
                message = {}
            now = time.monotonic()
            if message is None:
                break
            if message:
                moved_at, allowance_s = now, patience.stall_s + message.get("wait_s", 0.0)
            if "plan" in message:
                plan = _Plan(**message["plan"])
                progress.begin(plan)
            if "failure" in message:
                failure = _Failure(**message["failure"])
            done = done or "done" in message
            if seen != (seen := progress.measure()):
                moved_at, allowance_s = now, max(allowance_s, patience.stall_s)
            if now - moved_at > allowance_s:
                failure = _Failure("stalled", f"no bytes for {now - moved_at:.0f} s")
                break
        orphans = _open_temporaries(child.pid)
        if done:
            progress.end()
        elif failure is None:
            child.wait()
            stderr.seek(0)
            tail = stderr.read()[-400:].decode(errors="replace").strip().splitlines()
            failure = _Failure("died", f"exit code {child.returncode}: {(tail or ['-'])[-1]}")
    for orphan in orphans:
        orphan.unlink(missing_ok=True)
    return plan, failure


@contextlib.contextmanager
def _child(
    stderr: IO[bytes],
) -> Iterator[tuple["subprocess.Popen[str]", "queue.SimpleQueue[dict[str, Any] | None]"]]:
    messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def pump(lines: IO[str]) -> None:
        for line in lines:
            messages.put(json.loads(line))
        messages.put(None)

    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(  # noqa: S603 - this very file
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as child:
        reader = threading.Thread(target=pump, args=(child.stdout,), daemon=True)
        reader.start()
        try:
            yield child, messages
        finally:
            child.kill()
            child.wait()
            reader.join()


def _open_temporaries(pid: int) -> list[Path]:
    """Unfinished files that a process holds open (Linux; elsewhere they wait to grow old)."""
    found = []
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = link.readlink()
                if target.name.endswith(".incomplete"):
                    found.append(target)
    return found


def _temporaries(storage: Path) -> dict[Path, os.stat_result]:
    found = {}
    with contextlib.suppress(OSError):
        for path in (storage / "blobs").glob("*.incomplete"):
            with contextlib.suppress(OSError):
                found[path] = path.stat()
    return found


def _remove_orphans(storage: Path, log: logging.Logger) -> None:
    """Remove what killed downloads left: huggingface_hub 2.4 never takes such files up again."""
    for path, stat in _temporaries(storage).items():
        if time.time() - stat.st_mtime > _ORPHAN_AGE_S:
            with contextlib.suppress(OSError):
                path.unlink()
                log.info("removed an abandoned download of %s", _size(stat.st_size))


def _remove_locks(hub_cache: Path, repo: Repo) -> None:
    """Free files whose locks outlived their owners, as network mounts let them.

    Nobody else is writing either, or the watchdog would have seen bytes; and huggingface_hub 2.4
    stays correct without locks, since it renames finished files into place.
    """
    for lock in (hub_cache / ".locks" / repo.storage_name).glob("*.lock"):
        with contextlib.suppress(OSError):
            lock.unlink()


class _Progress:
    """Measures a download by its files and tells the log about it, at most every `every_s`."""

    def __init__(self, name: str, storage: Path, every_s: float, log: logging.Logger) -> None:
        self._name, self._storage, self._every_s, self._log = name, storage, every_s, log
        self._plan: _Plan | None = None
        self._foreign = set(_temporaries(storage))
        self._had = 0
        self._began_at = self._told_at = time.monotonic()

    def begin(self, plan: _Plan) -> None:
        self._plan = plan
        self._had = self._finished()
        self._began_at = self._told_at = time.monotonic()
        self._log.info(
            "%s: downloading %d files, %s, of which %s are here (revision %.7s)",
            self._name,
            len(plan.sizes),
            _size(plan.total),
            _size(self._had),
            plan.sha,
        )

    def measure(self) -> tuple[int, int]:
        """Return the bytes finished and under way, by whatever process; log them when due."""
        finished = self._finished()
        temporaries = _temporaries(self._storage)
        mine = sum(s.st_size for path, s in temporaries.items() if path not in self._foreign)
        now = time.monotonic()
        if self._plan is not None and now - self._told_at >= self._every_s:
            self._told_at = now
            total = self._plan.total
            have = min(total, finished + mine)
            rate = max(0.0, (have - self._had) / (now - self._began_at))
            left = f"{(total - have) / rate:.0f} s left" if rate > 0 else "waiting for data"
            self._log.info(
                "%s: %d %% of %s, %.1f MB/s, %s",
                self._name,
                100 * have // max(1, total),
                _size(total),
                rate / 1e6,
                left,
            )
        return finished, sum(s.st_size for s in temporaries.values())

    def end(self) -> None:
        took_s = max(1e-3, time.monotonic() - self._began_at)
        got = self._finished() - self._had
        self._log.info(
            "%s: downloaded %s in %.1f s, %.1f MB/s",
            self._name,
            _size(got),
            took_s,
            got / took_s / 1e6,
        )

    def _finished(self) -> int:
        if self._plan is None:
            return 0
        folder = self._storage / "snapshots" / self._plan.sha
        return sum(_bytes(folder / file) or 0 for file in self._plan.sizes)


# ---------------------------------------------------------------- what people are told


def _error(
    repo: Repo,
    hub_cache: Path,
    storage: Path,
    plan: _Plan | None,
    failure: _Failure,
    failures: int,
    token: str | None,
    endpoint: str | None,
) -> ModelError:
    name, page = repo.id, f"{(endpoint or HUB).rstrip('/')}/{repo.id}"
    detail = _plain(failure.detail, token)
    match failure.kind:
        case "gated" if token is None:
            return ModelGated(
                f"{name} is gated: accept its licence at {page} and set HF_TOKEN to a token of "
                "that account (https://huggingface.co/settings/tokens)"
            )
        case "gated":
            return ModelGated(
                f"{name} is gated and the account of HF_TOKEN has no access: accept its licence at "
                f"{page} with that account; a fine-grained token also needs the permission to "
                "read public gated repositories"
            )
        case "token":
            return ModelGated(
                "the Hub refuses HF_TOKEN (401): it is wrong, expired or revoked; make a new one "
                "at https://huggingface.co/settings/tokens, or unset it for a public model"
            )
        case "forbidden":
            return ModelGated(
                f"the Hub denies access to {name} (403): {detail}; check at {page} that the "
                "account of HF_TOKEN may read it"
            )
        case "repository":
            private = (
                "if it is private, set HF_TOKEN"
                if token is None
                else "if it is private, HF_TOKEN must belong to an account that may read it"
            )
            return ModelNotFound(f"there is no model {name} on the Hub: check the name; {private}")
        case "revision":
            return ModelNotFound(
                f"{name} has no revision {repo.revision!r}: see {page}/commits/main for what it has"
            )
        case "weights":
            return ModelNotFound(f"{name}: {detail}")
        case "room":
            needs = "its size is not known yet"
            if plan is not None:
                missing = plan.total - _finished_bytes(storage, plan)
                needs = f"it needs {_size(missing)} more ({_size(plan.total)} in all)"
            return DiskFull(
                f"no room for {name} in {hub_cache}: {needs}; enlarge the network volume, remove "
                "other models from it, or set HF_HOME to a larger one"
            )
        case "unwritable":
            return ModelError(
                f"cannot write to {hub_cache} ({detail}): set HF_HOME to a folder on a writable "
                "volume, or put the whole model there beforehand"
            )
        case "incomplete" | "entry":
            return ModelIncomplete(
                f"{name} is still incomplete after {failures} downloads: {detail}; what the Hub "
                f"serves does not match its own listing, try another revision (see {page})"
            )
        case "network" | "busy" | "stalled" | "died":
            return ModelOffline(
                f"{name} could not be downloaded from {endpoint or HUB}: "
                f"{_explained(failure, token)}; check the network and HF_ENDPOINT and start "
                "again (finished files are kept), or put the model on the volume beforehand"
            )
    return ModelError(f"{name} could not be downloaded: {detail}")


def _explained(failure: _Failure, token: str | None) -> str:
    what = {
        "network": "the connection failed or broke off",
        "busy": "the Hub is busy or limits requests",
        "stalled": "the download stalled",
        "died": "the download process died",
        "incomplete": "files came incomplete",
    }[failure.kind]
    return f"{what} ({_plain(failure.detail, token)})"


def _plain(text: str, token: str | None) -> str:
    """One short line without the token and without the signed query of a URL."""
    if token:
        text = text.replace(token, "***")
    return re.sub(r"\?[^\s'\"]+", "?…", " ".join(text.split()))[:300]


def _size(size_bytes: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} bytes"


def _listed(faults: Mapping[str, str]) -> str:
    shown = [f"{file}: {reason}" for file, reason in list(faults.items())[:5]]
    more = [f"and {len(faults) - 5} more"] if len(faults) > 5 else []
    return ", ".join(shown + more)


# ---------------------------------------------------------------- the child process


def _child_main() -> None:
    job = json.loads(sys.stdin.readline())
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the messages
    lock = threading.Lock()

    def say(**message: Any) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=channel, flush=True)

    def end_with_parent() -> None:
        sys.stdin.read()
        for orphan in _open_temporaries(os.getpid()):
            orphan.unlink(missing_ok=True)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        _fetch(job, say)
    except Exception as error:
        say(failure=_diagnose(error))
    else:
        say(done=True)
    os._exit(0)


def _fetch(job: Mapping[str, Any], say: Callable[..., None]) -> None:
    from huggingface_hub import (
        HfApi,
        RepoFile,
        constants,
        get_cached_repo_tree,
        snapshot_download,
    )
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    # Read through the module at each use; a blocking call to the public Hub is behind it.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    _relay_waits(say)
    repo, cache_dir, endpoint = job["repo"], job["cache_dir"], job["endpoint"]
    token = job["token"] or False

    def fetch(revision: str, files: Sequence[str]) -> str:
        return snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            endpoint=endpoint,
            allow_patterns=[re.sub(r"([*?[])", r"[\1]", file) for file in files],
            tqdm_class=_tally(say),
        )

    say(started=True)
    # The smallest useful file first: it brings the commit and the listing, and tells at once
    # whether the files may be read at all.
    sha = Path(fetch(job["revision"], ["config.json"])).name
    try:
        tree = get_cached_repo_tree(repo, revision=sha, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:
        listing = HfApi(endpoint=endpoint, token=token).list_repo_tree(
            repo, revision=sha, recursive=True
        )
        tree = [entry for entry in listing if isinstance(entry, RepoFile)]
    all_sizes = {entry.path: entry.size for entry in tree}
    sizes = {file: all_sizes[file] for file in select_files(all_sizes, job["file"])}
    if not _weights(list(sizes), job["file"]):
        ggufs = [file for file in all_sizes if file.endswith(".gguf")]
        hint = f"; choose a GGUF file as {repo}/{ggufs[0]}" if ggufs else ""
        missing = job["file"] or "weights that the engine reads (.safetensors, .bin or .pt)"
        say(failure={"kind": "weights", "detail": f"the repository has no {missing}{hint}"})
        os._exit(0)
    say(plan={"sha": sha, "sizes": sizes})
    fetch(sha, list(sizes))


def _tally(say: Callable[..., None]) -> Any:
    """Return a silent progress bar that reports, at most once a second, that bytes moved."""
    from huggingface_hub.utils.tqdm import tqdm

    class Tally(tqdm):
        monitor_interval = 0
        told_at = 0.0

        def display(self, *_: Any, **__: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> None:
            if n and time.monotonic() - Tally.told_at > 1:
                Tally.told_at = time.monotonic()
                say(moved=True)
            super().update(n)

    return Tally


def _relay_waits(say: Callable[..., None]) -> None:
    """Tell the watchdog when the Hub library waits because the Hub asked it to."""

    class Relay(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if wait := re.search(r"Waiting ([\d.]+)s before retry", record.getMessage()):
                say(wait_s=float(wait.group(1)))

    logging.getLogger("huggingface_hub").addHandler(Relay())


def _diagnose(error: BaseException) -> dict[str, Any]:
    """Say what an exception of huggingface_hub 2.4 means; its cause counts, not its wrapping."""
    from huggingface_hub import errors as hub

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def verdict(kind: str, cause: BaseException, **more: Any) -> dict[str, Any]:
        return {"kind": kind, "detail": f"{type(cause).__name__}: {cause}", **more}

    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return verdict("room", cause)
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return verdict("unwritable", cause)
    kinds: list[tuple[type[BaseException], str]] = [
        (hub.GatedRepoError, "gated"),
        (hub.RevisionNotFoundError, "revision"),
        (hub.RepositoryNotFoundError, "repository"),
        (hub.RemoteEntryNotFoundError, "entry"),
    ]
    for cause in chain:
        for kind_of, kind in kinds:
            if isinstance(cause, kind_of):
                return verdict(kind, cause)
        if isinstance(cause, hub.HfHubHTTPError):
            status = cause.response.status_code
            if status in (408, 429) or status >= 500:
                after = str(cause.response.headers.get("Retry-After", ""))
                wait_s = min(300.0, float(after)) if after.isdecimal() else 0.0
                return verdict("busy", cause, retry_after_s=wait_s)
            return verdict({401: "token", 403: "forbidden"}.get(status, "refused"), cause)
    for cause in chain:
        # The HTTP library beneath the Hub's has changed before (requests, httpx, httpx2).
        if type(cause).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests"):
            return verdict("network", cause)
        if isinstance(cause, ConnectionError) or "Consistency check failed" in str(cause):
            return verdict("network", cause)
    return verdict("unexpected", error)


if __name__ == "__main__":
    _child_main()
