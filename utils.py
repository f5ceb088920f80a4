"""Model snapshots: from a name in MODELS to a folder of complete files that the engine can load.

The one door: others import this module only, and people run it (`python utils.py --help`). Behind
it, `model_places` knows where a model may be, `model_files` which files are needed and whether they
are whole, `model_cache` the layout of the Hub's cache, `model_download` whose turn it is to fill
it. Knows nothing of the engine, of keys or of the environment: settings arrive as arguments.

A complete model on disk is used without a single network call.

`huggingface_hub` is imported inside functions only, here and behind the door: it freezes HF_HOME
and its other settings when it is first imported.
"""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import hub_headers
import model_shape
from errors import ModelIncomplete, ModelNotFound, ModelOffline
from hub_download import Failure, Hub, Patience
from model_cache import Repo, known_hashes, only_snapshot, revisions
from model_download import make_whole
from model_failures import error_of
from model_files import human_size, listed
from model_hashes import check_hashes
from model_places import (
    RUNPOD_CACHE,
    Found,
    Places,
    Snapshot,
    Source,
    Timed,
    in_cache,
    is_local,
    untimed,
)
from model_shape import Shape

__all__ = [
    "RUNPOD_CACHE",
    "Patience",
    "Snapshot",
    "Source",
    "Timed",
    "Verdict",
    "repair",
    "resolve",
    "shape_of",
    "verify",
]

_HASHING_TOLD_EVERY_S = 5.0


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
    timed: Timed = untimed,
) -> Snapshot:
    """Return the complete snapshot of `model`, downloading or repairing it where that is needed.

    `model` is a folder, a `.gguf` file, `org/name`, `org/name@revision` or `org/name/file.gguf`.
    With `model_path` only the name is taken from it. A cached branch is not compared with the
    Hub's: name a revision to move on. Blocks for as long as the download takes, be it another
    worker's; `worker` is the name under which others see this one's.
    Raises ModelNotFound, ModelGated, ModelOffline, ModelIncomplete, DiskFull or ModelError.
    """
    log = log or logging.getLogger(__name__)
    hub = Hub(hub_cache, token, endpoint, patience or Patience(), log, worker)
    places = Places(hub_cache, runpod_cache, model_path, model_dirs)
    with timed("resolve"):
        snapshot = _resolve(model, places, hub, offline, timed)
    log.info(
        "%s: complete, %s, from %s: %s",
        snapshot.name,
        human_size(snapshot.bytes),
        snapshot.source,
        snapshot.path,
    )
    return snapshot


def shape_of(
    model: str,
    *,
    hub_cache: Path,
    model_path: Path | None = None,
    model_dirs: Sequence[Path] = (),
    token: str | None = None,
    endpoint: str | None = None,
    offline: bool = False,
) -> tuple[str, Shape]:
    """Return a model's name and its shape; of one that is only on the Hub, without its weights.

    Takes what `resolve` takes and raises the same errors, but writes nothing.
    """
    try:
        here = resolve(
            model, hub_cache=hub_cache, model_path=model_path, model_dirs=model_dirs, offline=True
        )
    except (ModelOffline, ModelIncomplete):
        if offline or model_path is not None or is_local(model):
            raise
    else:
        return here.name, model_shape.of_folder(here.path)
    repo = Repo.parse(model)
    hub = Hub(hub_cache, token, endpoint, Patience(), logging.getLogger(__name__))
    shape, failure = hub_headers.read(repo, hub)
    if shape is None:
        raise error_of(failure or Failure("unexpected"), repo, hub, None, 1)
    if not shape.file_bytes:
        missing = repo.file or "weights that the engine reads"
        raise ModelNotFound(f"{repo.id} has no {missing} at {repo.revision}")
    return repo.id, shape


def _resolve(model: str, places: Places, hub: Hub, offline: bool, timed: Timed) -> Snapshot:
    partial: Found | None = None
    for found in places.find(model, hub.log, timed):
        if not found.faults:
            return found.snapshot
        if found.snapshot.source in ("MODEL_PATH", "folder"):
            raise ModelIncomplete(
                f"the model in {found.folder} is incomplete: {listed(found.faults)}; copy these "
                "files again, or name a model of the Hub instead"
            )
        hub.log.warning(
            "%s: incomplete in %s: %s", found.snapshot.name, found.folder, listed(found.faults)
        )
        partial = partial or found
    repo = Repo.parse(model)
    try:
        if offline:
            raise ModelOffline(
                f"{repo.id} is not complete in {hub.cache} and HF_HUB_OFFLINE is set: unset it so "
                "that the model can be downloaded, or put the model on the volume beforehand"
            )
        mine = partial and partial.cached and partial.cached.cache == hub.cache
        had_bytes = partial.snapshot.bytes if partial and mine else 0
        with timed("download") as facts:
            began = time.perf_counter()
            snapshot = in_cache(make_whole(repo, hub), repo, "hub").snapshot
            got_bytes = max(0, snapshot.bytes - had_bytes)
            facts["bytes"] = got_bytes
            facts["MB_per_s"] = round(got_bytes / 1e6 / (time.perf_counter() - began), 1)
        return snapshot
    except ModelOffline as error:
        for cache, source in places.caches:
            only = only_snapshot(repo, cache)
            if only is not None:
                hub.log.warning("%s; using the only revision here, %s", error, only.sha)
                return in_cache(only, repo, source).snapshot
        if partial is None:
            raise
        raise ModelIncomplete(
            f"the files of {repo.id} in {partial.folder} are incomplete ({listed(partial.faults)}) "
            f"and could not be repaired: {error}"
        ) from error


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: the model where `resolve` would take it from, and its faulty files.

    `files` counts those that the engine needs, `hashed` those of them whose hash was compared.
    """

    snapshot: Snapshot
    faults: Mapping[str, str]
    files: int
    hashed: int


def verify(
    model: str,
    *,
    hub_cache: Path,
    runpod_cache: Path = RUNPOD_CACHE,
    model_path: Path | None = None,
    model_dirs: Sequence[Path] = (),
    sha256: bool = False,
    log: logging.Logger | None = None,
) -> Verdict:
    """Say what is wrong with the files of a model that is here; asks the disk only.

    With `sha256` every file is read and compared with the hash that the Hub gave for it.
    Raises ModelNotFound where there is nothing of the model.
    """
    log = log or logging.getLogger(__name__)
    found = list(Places(hub_cache, runpod_cache, model_path, model_dirs).find(model, log))
    if not found:
        raise _nothing_of(model, hub_cache)
    taken = next((each for each in found if not each.faults), found[0])
    faults, files = dict(taken.faults), taken.files
    hashes: dict[str, str] = {}
    if sha256 and taken.cached is not None:
        known = known_hashes(taken.cached)
        hashes = {file: known[file] for file in files if file in known and file not in faults}
        label = taken.snapshot.name
        faults |= check_hashes(taken.folder, hashes, label, _HASHING_TOLD_EVERY_S, log)
    return Verdict(taken.snapshot, faults, len(files), len(hashes))


def _nothing_of(model: str, hub_cache: Path) -> ModelNotFound:
    repo = Repo.parse(model)
    if here := revisions(hub_cache / repo.storage_name):
        named = ", ".join(f"{repo.id}@{revision}" for revision in here)
        return ModelNotFound(
            f"revision {repo.revision} of {repo.id} is not here, but {named}: name that, or fetch "
            f"{model} first"
        )
    if "/" not in repo.id:
        return ModelNotFound(
            f"there is nothing of {model} here, neither a folder nor a model in {hub_cache}; most "
            "models of the Hub are written org/name"
        )
    return ModelNotFound(f"there is nothing of {model} in {hub_cache}; fetch it first")


def repair(
    model: str,
    verdict: Verdict,
    *,
    hub_cache: Path,
    token: str | None = None,
    endpoint: str | None = None,
    patience: Patience | None = None,
    worker: str = "",
    log: logging.Logger | None = None,
) -> Snapshot:
    """Remove the faulty files of a verdict and fetch them again; raises as `resolve` does."""
    log = log or logging.getLogger(__name__)
    cached = next(
        (each.cached for each in Places(hub_cache).find(model, log) if each.cached is not None),
        None,
    )
    if verdict.snapshot.source != "cache" or cached is None:
        raise ModelIncomplete(
            f"{verdict.snapshot.path} is not in the cache of HF_HOME and is left as it is; copy "
            "the damaged files again"
        )
    repo = Repo.parse(model)
    hub = Hub(hub_cache, token, endpoint, patience or Patience(), log, worker)
    whole = make_whole(repo, hub, replace(cached, faults=verdict.faults))
    return in_cache(whole, repo, "hub").snapshot


if __name__ == "__main__":
    # Imported here only: the command imports this module.
    from model_commands import main

    sys.exit(main())
