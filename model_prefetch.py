"""Prefetch: a model's weights into the page cache, while the engine is still being imported.

Reads in the order in which vLLM's loader will (0.32: shards by natural order of their names), so
that the loader finds what it asks for first. Owns also what follows from where the files lie: the
load strategy of vLLM that suits the file system. Keeps nothing but the kernel's cache.
"""

import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import machine_memory
from model_files import human_size, listing, loaded, size_of

_READ_BYTES = 16 * 2**20
_PIECE_BYTES = 4 * _READ_BYTES
_THREADS = 8
# vLLM 0.32 prefetches what fits in this share of the memory, and warns of the rest.
_SHARE = 0.9

# Values of LOAD_FORMAT whose loaders read no weights, or not through the page cache.
_OTHER_WAYS = {"dummy", "instanttensor", "tensorizer", "ipc_cache", "modelexpress"}
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
_NETWORK = re.compile(
    r"fuse(\..*)?|nfs4?|lustre|cifs|smb3?|9p|ceph|beegfs|gpfs|virtiofs|wekafs|afs|mfs"
)


@dataclass(frozen=True)
class Prefetched:
    """What was read of all there is; `why` says what kept the rest away, if anything did."""

    bytes: int
    of_bytes: int
    seconds: float
    why: str = ""


def prefetch(
    path: Path,
    *,
    reserve_bytes: int = 0,
    load_format: str = "auto",
    threads: int = _THREADS,
    stop: threading.Event | None = None,
    log: logging.Logger | None = None,
) -> Prefetched:
    """Read a model's weights once, in the loader's order, as far as free memory goes.

    `reserve_bytes` is what the engine itself will take of the machine's memory. A file that cannot
    be read is left to the loader, which has the better error. Blocks; `stop` ends it early.
    """
    log = log or logging.getLogger(__name__)
    stop = stop or threading.Event()
    began = time.perf_counter()
    files = weight_files(path)
    total = sum(size_of(file) or 0 for file in files)
    kind = file_system(path)
    if kind in _IN_MEMORY:
        return Prefetched(0, total, 0.0, f"{kind} is memory already")
    if load_format.lower() in _OTHER_WAYS:
        return Prefetched(0, total, 0.0, f"{load_format} takes no weights from the page cache")
    room = max(0, machine_memory.available_bytes() - reserve_bytes)
    pieces: queue.SimpleQueue[tuple[Path, int, int]] = queue.SimpleQueue()
    for piece in _pieces(files, room):
        pieces.put(piece)
    done: list[int] = []
    workers = [
        threading.Thread(target=_read, args=(pieces, done, stop), daemon=True)
        for _ in range(threads)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    why = "stopped" if stop.is_set() else "too little free memory" if total > room else ""
    result = Prefetched(sum(done), total, time.perf_counter() - began, why)
    log.info(
        "prefetched %s of %s of weights in %.1f s, %.0f MB/s, from %s%s",
        human_size(result.bytes),
        human_size(total),
        result.seconds,
        result.bytes / 1e6 / max(result.seconds, 1e-3),
        kind or "an unknown file system",
        f" ({why})" if why else "",
    )
    return result


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a model's weights, in the order in which they are loaded."""
    if path.is_file():
        return [path]
    return sorted((path / name for name in loaded(listing(path))), key=_natural)


def _natural(path: Path) -> list[int | str]:
    # Odd members are numbers, so that like is compared with like.
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _pieces(files: list[Path], room: int) -> Iterator[tuple[Path, int, int]]:
    """Yield file, offset and length of what fits in the room, from the first file on."""
    for file in files:
        size = size_of(file) or 0
        for start in range(0, size, _PIECE_BYTES):
            length = min(_PIECE_BYTES, size - start, room)
            if length <= 0:
                return
            room -= length
            yield file, start, length


def _read(
    pieces: "queue.SimpleQueue[tuple[Path, int, int]]", done: list[int], stop: threading.Event
) -> None:
    """Read pieces until there are none: plain large reads, which every file system does well.

    `posix_fadvise(WILLNEED)` returns before anything is there, and FUSE may ignore it.
    """
    buffer = memoryview(bytearray(_READ_BYTES))
    while not stop.is_set():
        try:
            file, at, left = pieces.get_nowait()
        except queue.Empty:
            return
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                while left > 0 and not stop.is_set():
                    got = os.preadv(descriptor, [buffer[: min(left, _READ_BYTES)]], at)
                    if got == 0:
                        break
                    done.append(got)
                    at, left = at + got, left - got
            finally:
                os.close(descriptor)


def load_strategy(
    path: Path, options: Mapping[str, str], mounts: Path = Path("/proc/mounts")
) -> str | None:
    """Return vLLM's `safetensors_load_strategy` that suits where a model lies; None is its own.

    vLLM 0.32 prefetches from NFS and Lustre by itself, but takes FUSE, which RunPod's volumes are,
    for a local disk. What the options decide is left alone; vLLM refuses a strategy together with
    multi-threaded loading.
    """
    formats = ("", "auto", "hf", "safetensors", "mistral")
    if (
        options.get("SAFETENSORS_LOAD_STRATEGY")
        or options.get("LOAD_FORMAT", "").lower() not in formats
        or _multithreaded(options.get("MODEL_LOADER_EXTRA_CONFIG", ""))
        or not _NETWORK.fullmatch(file_system(path, mounts))
    ):
        return None
    files = [file for file in weight_files(path) if file.suffix == ".safetensors"]
    size = sum(size_of(file) or 0 for file in files)
    return "prefetch" if 0 < size <= _SHARE * machine_memory.available_bytes() else None


def _multithreaded(extra_config: str) -> bool:
    try:
        extra = json.loads(extra_config or "{}")
    except ValueError:
        return False  # vLLM's parser says what is wrong with it
    return isinstance(extra, dict) and bool(extra.get("enable_multithread_load"))


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Return the type of the file system that a model's files lie on; "" where it is not known.

    Of a snapshot in the Hub's cache, whose files are links, that of the files themselves.
    """
    with contextlib.suppress(OSError):
        path = next(iter(weight_files(path)), path).resolve()
        best, kind = -1, ""
        for line in mounts.read_text().splitlines():
            fields = line.split()
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1])
            # Of two at one place the later lies on top.
            if path.is_relative_to(point) and len(point) >= best:
                best, kind = len(point), fields[2]
        return kind
    return ""
