"""One download of one model from the Hub, in a child process that is watched and can be killed.

Imported, this file is the watcher; run as a script, it is the child, its job on stdin and its
messages on stdout, one JSON object a line. The Hub library cannot be interrupted from within, has
calls without a timeout, and takes no interest in whether bytes still arrive.

Decides nothing about retries and words nothing for people: it says what happened.
"""

import contextlib
import errno
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from model_cache import HUB, Repo
from model_files import CONFIGS, select_files, weights
from model_lease import Pace
from model_progress import Manifest, Progress

# EFBIG is what a limit on file sizes answers with; to the operator it is the same lack of room.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_CHILD_START_S = 60.0
_PIECE_BYTES = 256 * 1024


@dataclass(frozen=True)
class Patience:
    """How long a download is believed in.

    `attempts` counts failures in a row; a file that was finished starts the count again.
    """

    attempts: int = 5
    backoff_s: float = 1.0
    stall_s: float = 60.0
    log_every_s: float = 5.0
    pace: Pace = field(default_factory=Pace)

    @property
    def with_others_s(self) -> float:
        """How long another worker's download may bring nothing before it is taken over.

        Twice what its own watchdog allows, so that it is no longer believed in there either.
        """
        return 2 * self.attempts * self.stall_s


@dataclass(frozen=True)
class Hub:
    """The Hub, the cache that is filled from it, and in whose name and how patiently."""

    cache: Path
    token: str | None
    endpoint: str | None
    patience: Patience
    log: logging.Logger
    worker: str = ""


@dataclass(frozen=True)
class Failure:
    """Why a download ended early.

    `kind` is one of network, busy, stalled, died, incomplete, expired (refused by where the files
    are stored, whose addresses are signed for a while), which may pass; lost (it is another
    worker's turn now); and gated, token, forbidden, refused, repository, revision, entry, weights,
    config, room, unwritable, unexpected.
    `detail` may quote the Hub and needs redaction before it is shown.
    """

    kind: str
    detail: str = ""
    retry_after_s: float = 0.0


def download(
    hub: Hub, repo: Repo, revision: str, lost: Callable[[], bool]
) -> tuple[Manifest | None, Failure | None]:
    """Try once to make a revision's needed files present in the cache.

    The manifest is None where the failure came before the Hub had listed the files. Finished files
    are kept whatever happens; `patience.stall_s` without a byte ends the attempt, and `lost` does.
    """
    patience = hub.patience
    job = {
        "repo": repo.id,
        "revision": revision,
        "file": repo.file,
        "cache_dir": str(hub.cache),
        "token": hub.token,
        "endpoint": hub.endpoint,
    }
    manifest: Manifest | None = None
    failure: Failure | None = None
    done = False
    progress = Progress(repo.id, hub.cache / repo.storage_name, patience.log_every_s, hub.log)
    progress.ignore_unfinished()
    allowance_s = max(_CHILD_START_S, patience.stall_s)
    poll_s = min(1.0, patience.stall_s / 4, patience.log_every_s)
    with tempfile.TemporaryFile() as stderr, _child(stderr) as (child, messages):
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(job), file=child.stdin, flush=True)
        moved_at, seen = time.monotonic(), (0, 0)
        while failure is None:
            try:
                message = messages.get(timeout=poll_s)
            except queue.Empty:
                message = {}
            if message is None:
                break
            now = time.monotonic()
            if message:
                moved_at, allowance_s = now, patience.stall_s + message.get("wait_s", 0.0)
            if "manifest" in message:
                manifest = Manifest(**message["manifest"])
                progress.begin(manifest)
                progress.tell_manifest()
            if "failure" in message:
                failure = Failure(**message["failure"])
            done = done or "done" in message
            if seen != (seen := progress.measure()):
                moved_at = now
            if lost():
                failure = Failure("lost")
            elif now - moved_at > allowance_s:
                failure = Failure("stalled", f"no bytes for {now - moved_at:.0f} s")
        if failure is None and not done:
            failure = Failure("died", _last_words(child, stderr))
    if failure is None:
        progress.end()
    return manifest, failure


def _stop(child: "subprocess.Popen[str]") -> None:
    """Halt a child before it is killed, so that it opens no file after the look at them."""
    with contextlib.suppress(ChildProcessError):
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def _last_words(child: "subprocess.Popen[str]", stderr: IO[bytes]) -> str:
    code = child.wait()
    stderr.seek(0)
    lines = stderr.read()[-2000:].decode(errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1] if lines else 'no message'}"


@contextlib.contextmanager
def _child(
    stderr: IO[bytes],
) -> Iterator[tuple["subprocess.Popen[str]", "queue.SimpleQueue[dict[str, Any] | None]"]]:
    messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def pump(lines: IO[str]) -> None:
        try:
            for line in lines:
                messages.put(json.loads(line))
        finally:
            messages.put(None)

    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as child:
        reader = threading.Thread(target=pump, args=(child.stdout,), daemon=True)
        reader.start()
        try:
            yield child, messages
        finally:
            _stop(child)
            orphans = open_temporaries(child.pid)
            child.kill()
            child.wait()
            for orphan in orphans:
                orphan.unlink(missing_ok=True)
            reader.join()


def open_temporaries(pid: int) -> list[Path]:
    """Unfinished files that a process holds open (Linux; elsewhere they wait to grow old)."""
    found = []
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = link.readlink()
                if target.name.endswith(".incomplete"):
                    found.append(target)
    return found


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
        # Its threads go on meanwhile: what they open after a look is found by the next.
        while orphans := open_temporaries(os.getpid()):
            for orphan in orphans:
                orphan.unlink(missing_ok=True)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        _fetch(job, say)
    except Exception as error:
        say(failure=diagnose(error, job["endpoint"] or HUB))
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

    # Both are read through the module at each use. Telemetry hides a blocking call to the public
    # Hub; pieces of 10 MiB, the default, would look like a stall on a slow line.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    constants.DOWNLOAD_CHUNK_SIZE = _PIECE_BYTES
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
    if not weights(list(sizes), job["file"]):
        ggufs = [file for file in all_sizes if file.endswith(".gguf")]
        hint = f"; choose a GGUF file as {repo}/{ggufs[0]}" if ggufs else ""
        missing = job["file"] or "weights that the engine reads (.safetensors, .bin or .pt)"
        say(failure={"kind": "weights", "detail": f"the repository has no {missing}{hint}"})
        os._exit(0)
    if job["file"] is None and not any(config in sizes for config in CONFIGS):
        detail = (
            "the repository has no config.json, without which the engine cannot load it; name "
            "another revision, or the model that it was made from"
        )
        say(failure={"kind": "config", "detail": detail})
        os._exit(0)
    say(manifest={"sha": sha, "sizes": sizes})
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


def diagnose(error: BaseException, endpoint: str = HUB) -> dict[str, Any]:
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
        number = cause.errno if isinstance(cause, OSError) else None
        told = re.search(r"\(os error (\d+)\)", str(cause))
        if number is None and told:
            number = int(told.group(1))  # hf_xet 1.8 keeps the number in its text only
        if number in NO_ROOM:
            return verdict("room", cause)
        # Without a file it is a connection that was not permitted.
        if number in _NOT_WRITABLE and (told or getattr(cause, "filename", None)):
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
            if urlsplit(str(cause.response.url)).netloc != urlsplit(endpoint).netloc:
                return verdict("expired", cause)
            return verdict({401: "token", 403: "forbidden"}.get(status, "refused"), cause)
    # What remains of these is the network's: the HTTP library beneath the Hub's has changed before
    # (requests, httpx, httpx2), and hf_xet raises plain OSError and RuntimeError.
    for cause in reversed(chain):
        if "Consistency check failed" in str(cause):
            return verdict("incomplete", cause)
        module = type(cause).__module__.partition(".")[0]
        if module in ("httpx", "httpx2", "httpcore", "requests") or isinstance(
            cause, OSError | RuntimeError | hub.XetDownloadError
        ):
            return verdict("network", cause)
    return verdict("unexpected", error)


if __name__ == "__main__":
    _child_main()
