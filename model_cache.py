"""Models in a cache of the Hub's layout: what is there, what is wrong with it, how it is cleaned.

`models--org--name/` holds `refs/<branch>` (a commit), `snapshots/<commit>/` (links into `blobs/`)
and, written by huggingface_hub 2.4, `trees/<commit>.json` (every file's size). Downloads nothing.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from errors import ModelNotFound
from model_files import TOKENIZERS, check, human_size, listing, matches, select_files

HUB = "https://huggingface.co"

_REPO_ID = re.compile(r"(\w[\w.-]*/)?\w([\w.-]*\w)?", re.ASCII)
_SHA = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
ORPHAN_AGE_S = 3600.0


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


@dataclass(frozen=True)
class Cached:
    """A repository's revision in one cache, whole or not."""

    cache: Path
    folder: Path
    sha: str
    sizes: Mapping[str, int] | None
    faults: Mapping[str, str]


def look_up(repo: Repo, cache: Path, sha: str | None = None) -> Cached | None:
    """Return what a cache holds of the repository's revision (or of commit `sha`), None if nothing.

    Asks the disk only: a branch means the commit that it stood for when it was downloaded.
    """
    storage = cache / repo.storage_name
    sha = sha or read_ref(storage, repo.revision)
    if sha is None or not (storage / "snapshots" / sha).is_dir():
        return None
    folder = storage / "snapshots" / sha
    sizes = _recorded_sizes(repo, cache, sha)
    faults = check(folder, sizes, repo.file)
    if not faults and sizes is None and repo.file is None:
        # Without the Hub's listing an interrupted download shows only in what it did not reach.
        names = [Path(file).name for file in listing(folder)]
        adapter = "adapter_config.json" in names and "config.json" not in names
        if not adapter and not any(matches(name, TOKENIZERS) for name in names):
            faults = {"tokenizer": "missing"}
    return Cached(cache, folder, sha, sizes, faults)


def read_ref(storage: Path, revision: str) -> str | None:
    """Return the commit that a branch or tag stood for when it was downloaded."""
    if _SHA.fullmatch(revision):
        return revision
    try:
        sha = (storage / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return sha if _SHA.fullmatch(sha) else None


def snapshots(storage: Path) -> list[str]:
    """Return the commits of which a repository's folder holds something."""
    try:
        return sorted(p.name for p in (storage / "snapshots").iterdir() if _SHA.fullmatch(p.name))
    except OSError:
        return []


def references(storage: Path) -> list[str]:
    """Return the branches and tags of which a repository's folder knows the commit."""
    folder = storage / "refs"
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def revisions(storage: Path) -> list[str]:
    """Return the revisions under which something of a repository is here."""
    shas = snapshots(storage)
    names = {ref: read_ref(storage, ref) for ref in references(storage)}
    return [ref for ref, sha in names.items() if sha in shas] + [
        sha for sha in shas if sha not in names.values()
    ]


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


def known_hashes(cached: Cached) -> dict[str, str]:
    """Return the hashes that the Hub gives for a revision's files, as far as they are known.

    64 hex digits are a file's SHA-256, 40 are git's hash of it. Blobs are named by them, and
    `trees/<sha>.json` has them (huggingface_hub 2.4 keeps the SHA-256 but does not give it out).
    """
    hashes = {}
    for file in listing(cached.folder):
        pointer = cached.folder / file
        if pointer.is_symlink() and _HASH.fullmatch(name := pointer.readlink().name):
            hashes[file] = name
    record = cached.folder.parent.parent / "trees" / f"{cached.sha}.json"
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
        for file, entry in json.loads(record.read_bytes())["files"].items():
            hashes[file] = entry.get("lfs_sha256") or entry["blob_id"]
    return hashes


def only_snapshot(repo: Repo, cache: Path) -> Cached | None:
    """Return the complete snapshot of a model whose branch is unknown, if there is just one.

    A model that was fetched by its commit leaves no branch behind; offline it will do.
    """
    storage = cache / repo.storage_name
    shas = snapshots(storage)
    if repo.revision != "main" or read_ref(storage, "main") is not None or len(shas) != 1:
        return None
    cached = look_up(repo, cache, shas[0])
    return cached if cached is not None and not cached.faults else None


def remove_damaged(cached: Cached, log: logging.Logger) -> None:
    """Delete what the Hub library would take for good: it asks only whether a file exists."""
    blobs = (cached.cache / cached.folder.parent.parent.name / "blobs").resolve()
    for file in cached.faults:
        pointer = cached.folder / file
        if not os.path.lexists(pointer):
            continue
        if pointer.is_symlink():
            blob = (pointer.parent / pointer.readlink()).absolute()
            if Path(os.path.normpath(blob)).parent.resolve() == blobs:
                blob.unlink(missing_ok=True)
        pointer.unlink(missing_ok=True)
        log.info("removed %s", file)


def temporaries(storage: Path) -> dict[Path, os.stat_result]:
    """Return the unfinished files of a repository's folder, whoever writes them."""
    found = {}
    with contextlib.suppress(OSError):
        for path in (storage / "blobs").glob("*.incomplete"):
            with contextlib.suppress(OSError):
                found[path] = path.stat()
    return found


def remove_orphans(storage: Path, now: float, age_s: float, log: logging.Logger) -> int:
    """Remove unfinished files to which nothing was written for `age_s`; return the bytes freed.

    Killed downloads leave them, and huggingface_hub 2.4 never takes them up again. `now` is the
    file server's time.
    """
    freed = 0
    for path, stat in temporaries(storage).items():
        if now - stat.st_mtime > age_s:
            with contextlib.suppress(OSError):
                path.unlink()
                freed += stat.st_size
                log.info("removed an abandoned download of %s", human_size(stat.st_size))
    return freed


def storages(cache: Path) -> list[Path]:
    """Return the folders of the repositories of which a cache holds something."""
    return sorted(path for path in cache.glob("models--*") if path.is_dir())


def repo_id_of(storage: Path) -> str:
    """Return the name of the repository that a folder of the cache belongs to."""
    return storage.name.removeprefix("models--").replace("--", "/")


def lock_folder_of(storage: Path) -> Path:
    """Return where the Hub library keeps a repository's locks, and we its lease."""
    return storage.parent / ".locks" / storage.name


def lock_folder(repo: Repo, cache: Path) -> Path:
    """Return the same of a repository that may not be there yet."""
    return lock_folder_of(cache / repo.storage_name)


def remove_locks(repo: Repo, cache: Path) -> None:
    """Free files whose locks outlived their owners, as network mounts let them.

    Nobody else is writing either, or the watchdog would have seen bytes; and huggingface_hub 2.4
    stays correct without locks, since it renames finished files into place.
    """
    for lock in lock_folder(repo, cache).glob("*.lock"):
        with contextlib.suppress(OSError):
            lock.unlink()
