"""Makes a repository's files whole in the cache: one of many workers downloads, the others wait.

Owns whose turn it is and how often a download is tried. One download is `hub_download`'s
business, the lease `model_lease`'s, which files are needed and whole `model_cache`'s.
"""

import random
import time

from hub_download import NO_ROOM, Failure, Hub, download
from model_cache import (
    ORPHAN_AGE_S,
    Cached,
    Repo,
    lock_folder,
    look_up,
    remove_damaged,
    remove_locks,
    remove_orphans,
)
from model_failures import error_of, explained
from model_files import listed
from model_lease import Claim, Lease, server_time
from model_progress import Manifest, Progress

_WORTH_RETRYING = ("network", "busy", "stalled", "died", "incomplete", "expired")
_LOOK_EVERY_S = 0.5


def make_whole(repo: Repo, hub: Hub, damaged: Cached | None = None) -> Cached:
    """Return the repository's revision, whole, however many workers want it at the same time.

    Files that `damaged` names are fetched again, whatever their size says. Raises ModelError.
    """
    claim = Claim(lock_folder(repo, hub.cache), hub.worker, hub.patience.pace, hub.log)
    while True:
        turn = _wait(claim, repo, hub, damaged is not None)
        if isinstance(turn, Cached):
            return turn
        with turn:
            # Whoever had it before may have finished after this one looked.
            cached = look_up(repo, hub.cache)
            if damaged is None and cached is not None and not cached.faults:
                return cached
            if turn.succeeds:
                remove_locks(repo, hub.cache)
            if downloaded := _download(repo, damaged or cached, turn, hub):
                return downloaded
        hub.log.warning("%s: another worker has taken over; waiting for it", repo.id)


def _wait(claim: Claim, repo: Repo, hub: Hub, repairing: bool) -> Lease | Cached:
    """Wait for this one's turn to download, or until another one's download is complete."""
    watch: _Watch | None = None
    while True:
        hopeless = watch is not None and watch.hopeless
        if lease := claim.take(even_from_the_living=hopeless):
            return lease
        cached = look_up(repo, hub.cache)
        # Without the Hub's listing a model under way may look whole before its last file.
        whole = cached is not None and not cached.faults and cached.sizes is not None
        if cached is not None and whole and not repairing:
            return cached
        if watch is None or watch.holder != claim.holder:
            watch = _Watch(claim, repo, hub)
        watch.look(cached)
        time.sleep(min(_LOOK_EVERY_S, hub.patience.pace.heartbeat_s))


class _Watch:
    """What one waiting worker sees of another one's download."""

    def __init__(self, claim: Claim, repo: Repo, hub: Hub) -> None:
        self.holder = claim.holder
        self._limit_s = hub.patience.with_others_s
        self._bytes = (0, 0)
        self._moved_at = time.monotonic()
        self._begun = False
        hub.log.info("%s: %s downloads it; waiting", repo.id, self.holder)
        label = f"{repo.id}, by {self.holder}"
        storage = hub.cache / repo.storage_name
        self._progress = Progress(label, storage, hub.patience.log_every_s, hub.log)

    def look(self, cached: Cached | None) -> None:
        """Take note of what has come since the last look, and log it when due."""
        if not self._begun and cached is not None and cached.sizes is not None:
            self._progress.begin(Manifest(cached.sha, cached.sizes))
            self._begun = True
        if self._bytes != (seen := self._progress.measure()):
            self._bytes, self._moved_at = seen, time.monotonic()

    @property
    def hopeless(self) -> bool:
        """Whether the holder lives, but for longer than its own watchdog allows nothing came."""
        return time.monotonic() - self._moved_at > self._limit_s


def _download(repo: Repo, partial: Cached | None, lease: Lease, hub: Hub) -> Cached | None:
    """Download until the files are whole or patience ends; None if the lease is lost."""
    # The revision that is already half there is completed, even if its branch has moved on.
    revision = partial.sha if partial else repo.revision
    storage = hub.cache / repo.storage_name

    def make_room(age_s: float) -> int:
        now = server_time(lock_folder(repo, hub.cache)) or time.time()
        return remove_orphans(storage, now, age_s, hub.log)

    make_room(ORPHAN_AGE_S)
    attempts, most = 0, -1
    while True:
        try:
            # Whatever this is refused with, it is not the network, which is worth a retry.
            hub.cache.mkdir(parents=True, exist_ok=True)
            if partial is not None:
                remove_damaged(partial, hub.log)
        except OSError as error:
            kind = "room" if error.errno in NO_ROOM else "unwritable"
            raise error_of(Failure(kind, str(error)), repo, hub, None, attempts) from error
        manifest, failure = download(hub, repo, revision, lambda: lease.lost)
        if lease.lost:
            return None
        partial = look_up(repo, hub.cache, manifest.sha) if manifest else None
        if failure is None and partial is not None:
            if not partial.faults:
                return partial
            failure = Failure("incomplete", listed(partial.faults))
        failure = failure or Failure("died", "it ended without a snapshot")
        if failure.kind in ("revision", "entry") and revision != repo.revision:
            # The commit that was half there is gone from the Hub.
            revision = repo.revision
            continue
        if failure.kind == "room" and make_room(2 * hub.patience.stall_s):
            continue  # what the killed have left need not grow old first
        finished = manifest.finished_bytes(storage) if manifest else 0
        attempts = 1 if finished > most else attempts + 1
        most = max(most, finished)
        if failure.kind not in _WORTH_RETRYING or attempts >= hub.patience.attempts:
            raise error_of(failure, repo, hub, manifest, attempts)
        if failure.kind == "stalled":
            remove_locks(repo, hub.cache)
        wait_s = max(failure.retry_after_s, hub.patience.backoff_s * 2 ** (attempts - 1))
        wait_s *= 1 + random.random() / 4  # noqa: S311 - spreads the workers, guards nothing
        hub.log.warning(
            "%s: %s; trying again in %.1f s (%d of %d)",
            repo.id,
            explained(failure, hub.token),
            wait_s,
            attempts,
            hub.patience.attempts - 1,
        )
        time.sleep(wait_s)
