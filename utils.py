"""Model snapshots: from a name in MODELS to a folder of complete files that the engine can load.

The one door: others import this module only. Behind it, `model_files` knows which files are
needed and whether they are whole, `model_cache` the layout of the Hub's cache, `hub_download`
runs one watched download. This module decides the order, the retries and what people are told.
It knows nothing of the engine, of keys or of the environment: settings arrive as arguments.

The order: MODEL_PATH, a local folder, MODEL_DIRS, the cache on the volume, RunPod's cached-model
location, the Hub. A complete model in any of those before is used without a single network call.

`huggingface_hub` is imported inside functions only, here and behind the door: it freezes HF_HOME
and its other settings when it is first imported.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from errors import ModelIncomplete, ModelNotFound, ModelOffline
from hub_download import Hub, Patience
from model_cache import Cached, Repo, look_up, only_snapshot, read_ref, snapshots
from model_download import make_whole
from model_files import check, check_file, human_size, listed, listing, select_files, size_of

__all__ = ["RUNPOD_CACHE", "Patience", "Snapshot", "Source", "Timed", "resolve"]

RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
"""Where RunPod places the models of its cached-model feature, in the layout of the Hub's cache."""

Source = Literal["MODEL_PATH", "folder", "MODEL_DIRS", "cache", "runpod cache", "hub"]

Timed = Callable[[str], AbstractContextManager[dict[str, int | float | str]]]
"""Times a phase by its name: `resolve`, and in it `verify` and `download`, whose bytes and rate go
into the mapping that it gives."""


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


@contextlib.contextmanager
def _untimed(_: str) -> Iterator[dict[str, int | float | str]]:
    yield {}


def resolve(
    model: str,
    *,
    hub_cache: Path,
    runpod_cache: Path = RUNPOD_CACHE,
    model_path: Path | None = None,
    model_dirs: Sequence[Path] = (),
    token: str | None = None,
    endpoint: str | None = None,
    offline: bool = False,
    patience: Patience | None = None,
    worker: str = "",
    log: logging.Logger | None = None,
    timed: Timed = _untimed,
) -> Snapshot:
    """Return the complete snapshot of `model`, downloading or repairing it where that is needed.

    `model` is a folder, a `.gguf` file, `org/name`, `org/name@revision` or `org/name/file.gguf`.
    With `model_path` only the name is taken from it. A cached branch is not compared with the
    Hub's: name a revision to move on. Blocks for as long as the download takes.
    Raises ModelNotFound, ModelGated, ModelOffline, ModelIncomplete, DiskFull or ModelError.
    """
    log = log or logging.getLogger(__name__)
    hub = Hub(hub_cache, token, endpoint, patience or Patience(), log, worker)
    with timed("resolve"):
        if model_path is not None:
            name = _folder_name(model) if _is_local(model) else Repo.parse(model).id
            snapshot = _from_folder(model_path, name, "MODEL_PATH", timed)
        elif _is_local(model):
            snapshot = _from_folder(Path(model), _folder_name(model), "folder", timed)
        else:
            repo = Repo.parse(model)
            snapshot = _from_dirs(repo, model_dirs, log, timed) or _from_hub_or_cache(
                repo, runpod_cache, hub, offline, timed
            )
    log.info(
        "%s: complete, %s, from %s: %s",
        snapshot.name,
        human_size(snapshot.bytes),
        snapshot.source,
        snapshot.path,
    )
    return snapshot


def _is_local(model: str) -> bool:
    explicit = model.startswith(("/", "./", "../", "~")) or model in (".", "..")
    return explicit or os.path.exists(model)


def _folder_name(model: str) -> str:
    return Path(model).expanduser().absolute().name


def _from_folder(path: Path, name: str, source: Source, timed: Timed) -> Snapshot:
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
    if faults:
        raise ModelIncomplete(
            f"the model in {path} is incomplete: {listed(faults)}; copy these files again, "
            "or name a model of the Hub instead"
        )
    return Snapshot(name, path, revision, source, total)


def _from_dirs(
    repo: Repo, folders: Iterable[Path], log: logging.Logger, timed: Timed
) -> Snapshot | None:
    """Return the model from the first of the folders in which it is whole."""
    org, _, name = repo.id.rpartition("/")
    names = [repo.id, name, f"{org}--{name}"] if org else [name]
    for path in (folder.expanduser() / name for folder in folders for name in names):
        path = path / repo.file if repo.file else path
        if not path.exists():
            continue
        if repo.revision != "main":
            log.warning("%s: not taken from %s: its revision is not known", repo.id, path)
            continue
        try:
            return _from_folder(path, repo.id, "MODEL_DIRS", timed)
        except ModelIncomplete as error:
            log.warning("%s: looking further: %s", repo.id, error)
    return None


def _total(folder: Path, files: Iterable[str]) -> int:
    return sum(size_of(folder / file) or 0 for file in files)


def _snapshot(cached: Cached, repo: Repo, source: Source) -> Snapshot:
    total = _total(cached.folder, select_files(listing(cached.folder), repo.file))
    path = cached.folder / repo.file if repo.file else cached.folder
    return Snapshot(repo.id, path, cached.sha, source, total)


def _from_hub_or_cache(
    repo: Repo, runpod_cache: Path, hub: Hub, offline: bool, timed: Timed
) -> Snapshot:
    places: list[tuple[Path, Source]] = [(hub.cache, "cache"), (runpod_cache, "runpod cache")]
    partial: Cached | None = None
    for cache, source in places:
        with timed("verify"):
            cached = look_up(repo, cache)
        if cached is None:
            continue
        if not cached.faults:
            return _snapshot(cached, repo, source)
        if partial is None:
            hub.log.warning("%s: incomplete in %s: %s", repo.id, cache, listed(cached.faults))
            partial = cached
    try:
        if offline:
            raise ModelOffline(
                f"{repo.id} is not complete in {hub.cache} and HF_HUB_OFFLINE is set: unset it so "
                "that the model can be downloaded, or put the model on the volume beforehand"
            )
        mine = partial if partial is not None and partial.cache == hub.cache else None
        had_bytes = _snapshot(mine, repo, "hub").bytes if mine else 0
        with timed("download") as facts:
            began = time.perf_counter()
            snapshot = _snapshot(make_whole(repo, hub), repo, "hub")
            got_bytes = max(0, snapshot.bytes - had_bytes)
            facts["bytes"] = got_bytes
            facts["MB_per_s"] = round(got_bytes / 1e6 / (time.perf_counter() - began), 1)
        return snapshot
    except ModelOffline as error:
        for cache, source in places:
            only = only_snapshot(repo, cache)
            if only is not None:
                hub.log.warning("%s; using the only revision here, %s", error, only.sha)
                return _snapshot(only, repo, source)
        if partial is None:
            raise
        raise ModelIncomplete(
            f"the files of {repo.id} in {partial.folder} are incomplete ({listed(partial.faults)}) "
            f"and could not be repaired: {error}"
        ) from error


if __name__ == "__main__":
    # Imported here only: the command imports this module.
    from model_commands import main

    sys.exit(main())
