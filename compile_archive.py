"""One file that carries a folder's files, and a seal that says who made it.

    tar: key.json, then regular files | 32 bytes: HMAC-SHA-256 of the tar's SHA-256

What is inside will be loaded as code, so nothing of an archive is looked at before
its seal has been verified, and that on a copy which nobody else can change. The tar
is not compressed: above some 100 MB/s a volume is read faster than gzip unpacks, and
it can hold no more than its own size.

Owns the format, the seal and whole-or-nothing writing. Knows nothing of vLLM, of
what the files are or of where archives are kept.
"""

import contextlib
import hashlib
import hmac
import io
import json
import os
import secrets
import stat
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

SEAL_BYTES = 32
MAX_ARCHIVE_BYTES = 4 * 2**30
PART_SUFFIX = ".part"

_KEY = "key.json"
_MAX_KEY_BYTES = 2**20
_BLOCK_BYTES = 2**20


class Unusable(Exception):
    """An archive that must not be used; its message says why."""


def write(
    target: Path, folder: Path, names: Iterable[str], key: Mapping[str, str], secret: bytes
) -> int:
    """Put files of `folder` into an archive at `target`, whole or not at all; return its size.

    What stood at `target` is replaced. OSError if it cannot be written, Unusable past the
    largest size.
    """
    # A name of its own: several workers may be writing the same archive.
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}{PART_SUFFIX}")
    try:
        with part.open("xb") as file:
            hashing = _Hashing(file)
            with tarfile.open(fileobj=hashing, mode="w|", bufsize=_BLOCK_BYTES) as tar:
                text = json.dumps(dict(key), sort_keys=True).encode()
                about = tarfile.TarInfo(_KEY)
                about.size = len(text)
                tar.addfile(about, io.BytesIO(text))
                for name in names:
                    _add(tar, folder / name, name)
            if hashing.bytes + SEAL_BYTES > MAX_ARCHIVE_BYTES:
                raise Unusable(f"it would have {hashing.bytes} bytes")
            file.write(_seal(secret, hashing.digest()))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return size


def extract(
    source: Path, folder: Path, key: Mapping[str, str], accepted: Sequence[bytes]
) -> tuple[int, int]:
    """Unpack the archive at `source` into `folder`; return how many files and bytes it held.

    Unusable, and nothing of it used, unless it was sealed with one of the secrets
    `accepted` and is for `key`; FileNotFoundError if there is none. After Unusable or
    OSError `folder` may hold a part of it, all of it verified.
    """
    with tempfile.TemporaryFile(dir=folder) as copy:
        _copy_verified(source, copy, accepted)
        try:
            with tarfile.open(fileobj=copy, mode="r:") as tar:
                about = tar.next()
                if about is None or about.name != _KEY or about.size > _MAX_KEY_BYTES:
                    raise Unusable("it does not say what it is for")
                content = tar.extractfile(about)
                if content is None or json.load(content) != dict(key):
                    raise Unusable("it is for something else than its name says")
                return _extract_files(tar, folder)
        except (tarfile.TarError, ValueError) as error:
            raise Unusable(f"it is not an archive: {error}") from None


def seal_of(path: Path) -> bytes | None:
    """Return the seal of an archive, which tells it from every other; None if there is none."""
    with contextlib.suppress(OSError), _opened(path) as file:
        file.seek(-SEAL_BYTES, os.SEEK_END)
        return file.read()
    return None


class _Hashing(io.RawIOBase):
    """A file that is written through its hash."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def digest(self) -> bytes:
        return self._hash.digest()


def _seal(secret: bytes, digest: bytes) -> bytes:
    return hmac.digest(secret, digest, "sha256")


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        member = tarfile.TarInfo(name)
        member.size = status.st_size
        member.mtime = int(status.st_mtime)
        member.mode = 0o700 if status.st_mode & stat.S_IXUSR else 0o600
        tar.addfile(member, file)


def _opened(path: Path) -> IO[bytes]:
    # A link that somebody put in its place is not followed, and a pipe is not waited for.
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def _copy_verified(source: Path, copy: IO[bytes], accepted: Sequence[bytes]) -> None:
    """Copy the tar of an archive, without its seal; Unusable if the seal is not one of ours."""
    with _opened(source) as file:
        left = os.fstat(file.fileno()).st_size - SEAL_BYTES
        if not 0 <= left <= MAX_ARCHIVE_BYTES:
            raise Unusable("it is too short or too long")
        digest = hashlib.sha256()
        while left and (block := file.read(min(_BLOCK_BYTES, left))):
            digest.update(block)
            copy.write(block)
            left -= len(block)
        seal = file.read(SEAL_BYTES)
    if not any(hmac.compare_digest(_seal(secret, digest.digest()), seal) for secret in accepted):
        raise Unusable("it is damaged, or not sealed with this worker's key")
    copy.seek(0)


def _extract_files(tar: tarfile.TarFile, folder: Path) -> tuple[int, int]:
    count = total = 0  # without sparse files the total is less than the archive's own size
    while (member := tar.next()) is not None:
        path = PurePosixPath(member.name)
        if (
            member.type != tarfile.REGTYPE
            or member.issparse()
            or path.is_absolute()
            or ".." in path.parts
            or path.parts in ((), (_KEY,))
        ):
            raise Unusable("it holds something else than files of its own folder")
        count += 1
        total += member.size
        tar.extract(member, folder, filter="data")
    return count, total
