"""Model snapshots: from a name in MODELS to a folder of complete files that the engine can load.

The one door: others import this module only. Behind it, `model_files` knows which files are
needed and whether they are whole, `model_cache` the layout of the Hub's cache, `hub_download`
runs one watched download. This module decides the order, the retries and what people are told.
It knows nothing of the engine, of keys or of the environment: settings arrive as arguments.

The order: MODEL_PATH, a local folder, the cache on the volume, RunPod's cached-model location,
the Hub. A complete model in any of the first four is used without a single network call.

`huggingface_hub` is imported inside functions only, here and behind the door: it freezes HF_HOME
and its other settings when it is first imported.
"""

import contextlib
import logging
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from errors import (
    DiskFull,
    ModelError,
    ModelGated,
    ModelIncomplete,
    ModelNotFound,
    ModelOffline,
)
from hub_download import Failure, Patience, Plan, download
from model_cache import (
    HUB,
    Cached,
    Repo,
    look_up,
    only_snapshot,
    read_ref,
    remove_damaged,
    remove_locks,
    remove_orphans,
    snapshots,
)
from model_files import check, check_file, human_size, listed, listing, select_files, size_of

__all__ = ["RUNPOD_CACHE", "Patience", "Snapshot", "Source", "Timed", "resolve"]

RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
"""Where RunPod places the models of its cached-model feature, in the layout of the Hub's cache."""

Source = Literal["MODEL_PATH", "folder", "cache", "runpod cache", "hub"]

Timed = Callable[[str], AbstractContextManager[dict[str, int | float | str]]]
"""Times a phase by its name: `resolve`, and in it `verify` and `download`, whose bytes and rate go
into the mapping that it gives."""

_WORTH_RETRYING = ("network", "busy", "stalled", "died", "incomplete")


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


@dataclass(frozen=True)
class _Hub:
    cache: Path
    token: str | None
    endpoint: str | None
    patience: Patience
    log: logging.Logger
    timed: Timed

    def page(self, repo: Repo) -> str:
        return f"{(self.endpoint or HUB).rstrip('/')}/{repo.id}"


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
    timed: Timed = _untimed,
) -> Snapshot:
    """Return the complete snapshot of `model`, downloading or repairing it where that is needed.

    `model` is a folder, a `.gguf` file, `org/name`, `org/name@revision` or `org/name/file.gguf`.
    With `model_path` only the name is taken from it. A cached branch is not compared with the
    Hub's: name a revision to move on. Blocks for as long as the download takes.
    Raises ModelNotFound, ModelGated, ModelOffline, ModelIncomplete, DiskFull or ModelError.
    """
    log = log or logging.getLogger(__name__)
    hub = _Hub(hub_cache, token, endpoint, patience or Patience(), log, timed)
    with timed("resolve"):
        if model_path is not None:
            name = _folder_name(model) if _is_local(model) else Repo.parse(model).id
            snapshot = _from_folder(model_path, name, "MODEL_PATH", timed)
        elif _is_local(model):
            snapshot = _from_folder(Path(model), _folder_name(model), "folder", timed)
        else:
            snapshot = _from_hub_or_cache(Repo.parse(model), runpod_cache, hub, offline)
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


def _total(folder: Path, files: Iterable[str]) -> int:
    return sum(size_of(folder / file) or 0 for file in files)


def _snapshot(cached: Cached, repo: Repo, source: Source) -> Snapshot:
    total = _total(cached.folder, select_files(listing(cached.folder), repo.file))
    path = cached.folder / repo.file if repo.file else cached.folder
    return Snapshot(repo.id, path, cached.sha, source, total)


def _from_hub_or_cache(repo: Repo, runpod_cache: Path, hub: _Hub, offline: bool) -> Snapshot:
    places: list[tuple[Path, Source]] = [(hub.cache, "cache"), (runpod_cache, "runpod cache")]
    partial: Cached | None = None
    for cache, source in places:
        with hub.timed("verify"):
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
        with hub.timed("download") as facts:
            began = time.perf_counter()
            snapshot = _snapshot(_download(repo, mine, hub), repo, "hub")
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


def _download(repo: Repo, partial: Cached | None, hub: _Hub) -> Cached:
    """Download into the cache until the files are whole, as often as patience allows."""
    # The revision that is already half there is completed, even if its branch has moved on.
    revision = partial.sha if partial else repo.revision
    storage = hub.cache / repo.storage_name
    remove_orphans(storage, hub.log)
    attempts, most = 0, -1
    while True:
        try:
            if partial is not None:
                remove_damaged(partial, hub.log)
        except OSError as error:
            raise _error(repo, hub, None, Failure("unwritable", str(error)), attempts) from error
        plan, failure = download(
            repo.id,
            revision,
            repo.file,
            cache=hub.cache,
            storage=storage,
            token=hub.token,
            endpoint=hub.endpoint,
            patience=hub.patience,
            log=hub.log,
        )
        partial = look_up(repo, hub.cache, plan.sha) if plan else None
        if failure is None and partial is not None:
            if not partial.faults:
                return partial
            failure = Failure("incomplete", listed(partial.faults))
        failure = failure or Failure("died", "it ended without a snapshot")
        if failure.kind in ("revision", "entry") and revision != repo.revision:
            # The commit that was half there is gone from the Hub.
            revision = repo.revision
            continue
        finished = plan.finished_bytes(storage) if plan else 0
        attempts = 1 if finished > most else attempts + 1
        most = max(most, finished)
        if failure.kind not in _WORTH_RETRYING or attempts >= hub.patience.attempts:
            raise _error(repo, hub, plan, failure, attempts)
        if failure.kind == "stalled":
            remove_locks(repo, hub.cache)
        wait_s = max(failure.retry_after_s, hub.patience.backoff_s * 2 ** (attempts - 1))
        wait_s *= 1 + random.random() / 4  # noqa: S311 - spreads the workers, guards nothing
        hub.log.warning(
            "%s: %s; trying again in %.1f s (%d of %d)",
            repo.id,
            _explained(failure, hub.token),
            wait_s,
            attempts,
            hub.patience.attempts - 1,
        )
        time.sleep(wait_s)


def _error(repo: Repo, hub: _Hub, plan: Plan | None, failure: Failure, attempts: int) -> ModelError:
    name, page, detail = repo.id, hub.page(repo), _plain(failure.detail, hub.token)
    tokens = "https://huggingface.co/settings/tokens"
    match failure.kind:
        case "gated" if hub.token is None:
            return ModelGated(
                f"{name} is gated: accept its licence at {page} and set HF_TOKEN to a token of "
                f"that account ({tokens})"
            )
        case "gated":
            return ModelGated(
                f"{name} is gated and the account of HF_TOKEN has no access: accept its licence at "
                f"{page} with that account; a fine-grained token also needs the permission to "
                f"read public gated repositories ({tokens})"
            )
        case "token":
            return ModelGated(
                "the Hub refuses HF_TOKEN (401), it is wrong, expired or revoked: make a new one "
                f"at {tokens}, or unset it for a public model"
            )
        case "forbidden":
            return ModelGated(
                f"the Hub denies access to {name} (403): check at {page} that the account of "
                f"HF_TOKEN may read it ({detail})"
            )
        case "repository":
            private = (
                "if it is private or gated, set HF_TOKEN"
                if hub.token is None
                else "if it is private, HF_TOKEN must belong to an account that may read it"
            )
            return ModelNotFound(f"there is no model {name} on the Hub: check the name; {private}")
        case "revision":
            return ModelNotFound(
                f"{name} has no revision {repo.revision!r}: its revisions are listed at "
                f"{page}/commits/main"
            )
        case "weights":
            return ModelNotFound(f"{name}: {detail}")
        case "room":
            needs = "its size is not known yet"
            if plan is not None:
                missing = plan.total - plan.finished_bytes(hub.cache / repo.storage_name)
                needs = f"it needs {missing / 1e9:.2f} GB more ({plan.total / 1e9:.2f} GB in all)"
            return DiskFull(
                f"no room for {name} in {hub.cache}: {needs}; enlarge the network volume, remove "
                "other models from it, or set HF_HOME to a folder on a larger one"
            )
        case "unwritable":
            return ModelError(
                f"cannot write to {hub.cache} ({detail}): set HF_HOME to a folder on a writable "
                "volume, or put the whole model there beforehand"
            )
        case "incomplete" | "entry":
            return ModelIncomplete(
                f"{name} is still incomplete after {attempts} downloads ({detail}): what the Hub "
                f"serves does not match its own listing; try another revision of {page}"
            )
        case "network" | "busy" | "stalled" | "died":
            return ModelOffline(
                f"{name} could not be downloaded from {hub.endpoint or HUB}, "
                f"{_explained(failure, hub.token)}: check the network and HF_ENDPOINT and start "
                "again (finished files are kept), or put the model on the volume beforehand"
            )
        case _:
            return ModelError(f"{name} could not be downloaded: {detail}")


def _explained(failure: Failure, token: str | None) -> str:
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


if __name__ == "__main__":
    # Imported here only: the command imports this module.
    from model_commands import main

    sys.exit(main())
