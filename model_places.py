"""Where a model may lie on disk, in the order of looking, and whether it is whole there.

The order: MODEL_PATH, a local folder, MODEL_DIRS, the cache on the volume, RunPod's cached-model
location. Looks only; whoever asks decides what an incomplete model means.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from errors import ModelNotFound
from model_cache import Cached, Repo, look_up, read_ref, snapshots
from model_files import check, check_file, listing, select_files, size_of

RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
"""Where RunPod places the models of its cached-model feature, in the layout of the Hub's cache."""

Source = Literal["MODEL_PATH", "folder", "MODEL_DIRS", "cache", "runpod cache", "hub"]

Timed = Callable[[str], AbstractContextManager[dict[str, int | float | str]]]
"""Times a phase by its name: `resolve`, and in it `verify` and `download`, whose bytes and rate go
into the mapping that it gives."""


@contextlib.contextmanager
def untimed(_: str) -> Iterator[dict[str, int | float | str]]:
    """Time nothing."""
    yield {}


@dataclass(frozen=True)
class Snapshot:
    """A complete model on disk.

    `name` is what is served by default (the repository id, or the folder's own name), `path` the
    folder to load (the file itself for GGUF), `revision` the commit where it is known, `bytes`
    the size of the files that the engine needs.
    """

    name: str
    path: Path
    revision: str | None
    source: Source
    bytes: int


@dataclass(frozen=True)
class Found:
    """A model in one place, with what is wrong with its files; `cached` if the place is a cache."""

    snapshot: Snapshot
    faults: Mapping[str, str]
    cached: Cached | None = None

    @property
    def files(self) -> list[str]:
        """The files that the engine needs, relative to `folder`."""
        path = self.snapshot.path
        if self.cached is None:
            return [path.name] if path.is_file() else select_files(listing(path))
        gguf = path.relative_to(self.cached.folder).as_posix() if path.suffix == ".gguf" else None
        return select_files(listing(self.cached.folder), gguf)

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        path = self.snapshot.path
        if self.cached is not None:
            return self.cached.folder
        return path.parent if path.is_file() else path


@dataclass(frozen=True)
class Places:
    """Which places there are."""

    hub_cache: Path
    runpod_cache: Path = RUNPOD_CACHE
    model_path: Path | None = None
    model_dirs: Sequence[Path] = ()

    @property
    def caches(self) -> list[tuple[Path, Source]]:
        """The places that have the layout of the Hub's cache."""
        return [(self.hub_cache, "cache"), (self.runpod_cache, "runpod cache")]

    def find(self, model: str, log: logging.Logger, timed: Timed = untimed) -> Iterator[Found]:
        """Yield where the model is, whole or not, in order; raises ModelNotFound for bad names.

        A MODEL_PATH or a folder is the only place there is.
        """
        if self.model_path is not None:
            name = _folder_name(model) if is_local(model) else Repo.parse(model).id
            yield _in_folder(self.model_path, name, "MODEL_PATH", timed)
            return
        if is_local(model):
            yield _in_folder(Path(model), _folder_name(model), "folder", timed)
            return
        repo = Repo.parse(model)
        for path in _folders_of(repo, self.model_dirs):
            if repo.revision != "main":
                log.warning("%s: not taken from %s: its revision is not known", repo.id, path)
            else:
                yield _in_folder(path, repo.id, "MODEL_DIRS", timed)
        for cache, source in self.caches:
            with timed("verify"):
                cached = look_up(repo, cache)
            if cached is not None:
                yield in_cache(cached, repo, source)


def is_local(model: str) -> bool:
    """Whether a model is named by its path, not by its name on the Hub."""
    explicit = model.startswith(("/", "./", "../", "~")) or model in (".", "..")
    return explicit or os.path.exists(model)


def _folder_name(model: str) -> str:
    return Path(model).expanduser().absolute().name


def _folders_of(repo: Repo, folders: Iterable[Path]) -> Iterator[Path]:
    org, _, name = repo.id.rpartition("/")
    names = [repo.id, name, f"{org}--{name}"] if org else [name]
    for path in (folder.expanduser() / name for folder in folders for name in names):
        path = path / repo.file if repo.file else path
        if path.exists():
            yield path


def _in_folder(path: Path, name: str, source: Source, timed: Timed) -> Found:
    path = path.expanduser()
    if not path.exists():
        raise ModelNotFound(
            f"{'MODEL_PATH' if source == 'MODEL_PATH' else 'the model folder'} {path} does not "
            "exist; check the path and that the volume is attached"
        )
    revision = None
    if (path / "snapshots").is_dir():
        # The repository's folder in a cache of the Hub, one level above the model's files.
        revision = read_ref(path, "main") or next(iter(snapshots(path)), None)
        path = path / "snapshots" / (revision or "")
    with timed("verify"):
        if path.is_file():
            faults = check_file(path)
            total = size_of(path) or 0
        else:
            faults = check(path)
            total = _total(path, select_files(listing(path)))
    return Found(Snapshot(name, path, revision, source, total), faults)


def in_cache(cached: Cached, repo: Repo, source: Source) -> Found:
    """Return a repository's revision in a cache as a place."""
    total = _total(cached.folder, select_files(listing(cached.folder), repo.file))
    path = cached.folder / repo.file if repo.file else cached.folder
    return Found(Snapshot(repo.id, path, cached.sha, source, total), cached.faults, cached)


def _total(folder: Path, files: Iterable[str]) -> int:
    return sum(size_of(folder / file) or 0 for file in files)
