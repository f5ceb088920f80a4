"""Records of submitted jobs: what opens an answer later, in files that their owner alone can read.

Owns the files: their form, their modes, when they are written and when they are forgotten.
A record holds no prompt, no answer and neither key; whoever has it can open one answer.
Knows nothing of HTTP, and of cryptography only that a response secret is one (SPEC section 2).

A record is written before its job goes out, since from then on the platform may have the job,
under the request's id. When the platform has told the job's id, the file is renamed to it. One
that never was stands for a job that the platform may or may not have.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote

import msgspec

from client_config import read_key_file
from errors import RecordError

TTL_S = 24 * 60 * 60
"""How long a submitted request is valid unless it says so: as long as RunPod keeps a job."""

KEPT_S = 30 * 60
"""How long the platform keeps the answer of a job that has ended."""

_CONFIRMED, _UNCONFIRMED = ".job", ".request"

_Hex = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_KeyId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{16}\Z")]
_Secret = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{43}\Z")]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedJob:
    """A job that nobody waits for, and what opens its answer; times in Unix seconds."""

    id: str = ""
    """The platform's id, empty until it has told one."""
    endpoint_id: str
    key_id: _KeyId
    request_id: _Hex
    response_secret: _Secret = field(repr=False)
    public_key_id: _KeyId | None = None
    """Which of the worker's public keys the request was sealed to, in public-key mode."""
    reply_seed: _Secret | None = field(default=None, repr=False)
    """What the answer's one-time key is made of, in public-key mode."""
    route: str
    issued_at: int
    expires_at: int

    @property
    def gone_at(self) -> int:
        """When the platform has no answer of it any more, whatever became of it."""
        return self.expires_at + KEPT_S

    def public(self) -> dict[str, Any]:
        """Return everything that may be shown."""
        shown = {**asdict(self), "gone_at": self.gone_at}
        del shown["response_secret"], shown["reply_seed"]
        return shown


class JobRecords:
    """The records in one folder, which is made when the first one is added."""

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time) -> None:
        self.folder = folder.expanduser()
        self._now = now

    def add(self, job: SubmittedJob) -> None:
        """Write the record of a job that is about to be submitted; on disk when this returns."""
        content = asdict(job)
        del content["id"]
        for name in ("public_key_id", "reply_seed"):
            if content[name] is None:
                del content[name]
        try:
            self._make_folder()
            self.forget()
            path = self.path(job)
            # 0600 from the first byte, and never somebody else's file or link.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with open(os.open(path, flags, 0o600), "wb") as file:
                file.write(msgspec.json.encode(content))
                file.flush()
                os.fsync(file.fileno())
            _sync(self.folder)
        except OSError as error:
            raise RecordError(f"no record can be kept in {self.folder}: {error.strerror}") from None

    def confirm(self, job: SubmittedJob, job_id: str) -> SubmittedJob:
        """Name the record of a submitted job by the id that the platform told."""
        confirmed = replace(job, id=job_id)
        try:
            self.path(job).rename(self.path(confirmed))
            _sync(self.folder)
        except OSError as error:
            raise RecordError(
                f"the record of job {job_id} cannot be renamed: {error.strerror}; it is "
                f"{self.path(job)}"
            ) from None
        return confirmed

    def find(self, job_id: str) -> SubmittedJob | None:
        """Return the record of a job, None if there is none; RecordError if it cannot be used."""
        path = self.folder / f"{quote(job_id, safe='')}{_CONFIRMED}"
        try:
            path.lstat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecordError(f"the record {path} cannot be read: {error.strerror}") from None
        return _read(path)

    def unconfirmed(self) -> list[SubmittedJob]:
        """Return the records of jobs whose id the platform never told."""
        found, _ = self.listed()
        return [job for job in found if not job.id]

    def listed(self) -> tuple[list[SubmittedJob], list[RecordError]]:
        """Return all records, oldest first, and what is wrong with those that cannot be used."""
        found, faults = [], []
        for path in self._paths():
            try:
                found.append(_read(path))
            except RecordError as fault:
                faults.append(fault)
        return sorted(found, key=lambda job: job.issued_at), faults

    def path(self, job: SubmittedJob) -> Path:
        """Return where the record of a job is."""
        name = f"{quote(job.id, safe='')}{_CONFIRMED}" if job.id else job.request_id + _UNCONFIRMED
        return self.folder / name

    def discard(self, job: SubmittedJob) -> None:
        """Remove the record of a job, if there is one: its answer cannot be opened any more."""
        with suppress(FileNotFoundError):
            self.path(job).unlink()

    def forget(self) -> None:
        """Remove the records of jobs whose answer the platform cannot have any more."""
        now = self._now()
        for path in self._paths():
            try:
                gone_at: float = _read(path).gone_at
            except RecordError:
                gone_at = _modified_at(path) + TTL_S + KEPT_S
            if gone_at < now:
                path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        try:
            return [p for p in self.folder.iterdir() if p.suffix in (_CONFIRMED, _UNCONFIRMED)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RecordError(f"{self.folder} cannot be read: {error.strerror}") from None

    def _make_folder(self) -> None:
        is_new = not self.folder.exists()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_new:
            _sync(self.folder.parent)
        mode = self.folder.stat().st_mode & 0o777
        if mode & 0o077:
            raise RecordError(
                f"{self.folder} is open to others (mode {mode:04o}); run: chmod 700 {self.folder}"
            )


def _read(path: Path) -> SubmittedJob:
    try:
        text = read_key_file(str(path))
    except ValueError as error:
        raise RecordError(f"the record {error}") from None
    try:
        job = msgspec.json.decode(text, type=SubmittedJob)
    except ValueError:
        raise RecordError(
            f"the record {path} is damaged; the answer of its job cannot be opened"
        ) from None
    return replace(job, id=unquote(path.stem) if path.suffix == _CONFIRMED else "")


def _modified_at(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _sync(folder: Path) -> None:
    # A file is there for good when its folder's entry is on disk as well.
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
