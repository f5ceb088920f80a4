"""The prefetch into the kernel's page cache, seen by asking the kernel what is in there."""

import contextlib
import ctypes
import logging
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import machine_memory
from model_prefetch import file_system, load_strategy, prefetch, weight_files

LOG = logging.getLogger("test.prefetch")
FUSE = Path(__file__).parent / "fuse.py"
SHARD_BYTES = 24 * 2**20
PAGE = mmap.PAGESIZE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its page cache")


def resident(file: Path) -> float:
    """Return the share of a file that is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    size = file.stat().st_size
    pages = -(-size // PAGE)
    found = (ctypes.c_ubyte * pages)()
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY)
    view = (ctypes.c_char * size).from_buffer(mapped)
    failed = libc.mincore(ctypes.addressof(view), size, found)
    del view
    mapped.close()
    assert not failed, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in found) / pages


def evict(file: Path) -> None:
    """Have the kernel forget a file's pages."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of three shards, none of it in the page cache."""
    if file_system(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("the tests' folder is memory")
    (tmp_path / "config.json").write_text("{}")
    for number in (1, 2, 10):
        file = tmp_path / f"model-{number}-of-10.safetensors"
        file.write_bytes(os.urandom(SHARD_BYTES))
        evict(file)
        assert resident(file) < 0.1
    return tmp_path


def test_after_it_the_weights_are_in_the_page_cache(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    done = prefetch(model, log=LOG)
    assert (done.bytes, done.of_bytes, done.why) == (3 * SHARD_BYTES, 3 * SHARD_BYTES, "")
    assert [resident(file) for file in weight_files(model)] == [1.0, 1.0, 1.0]
    assert "prefetched 75.50 MB of 75.50 MB" in caplog.text


def test_it_begins_where_the_loader_begins_and_ends_with_the_free_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What it may take is given, for the machine's own is not in the test's hands.
    monkeypatch.setattr(machine_memory, "available_bytes", lambda: 10 * SHARD_BYTES)
    done = prefetch(model, reserve_bytes=8 * SHARD_BYTES + SHARD_BYTES // 2)
    assert (done.bytes, done.why) == (SHARD_BYTES * 3 // 2, "too little free memory")
    first, second, third = (resident(file) for file in weight_files(model))
    assert first == 1.0
    assert second > 0.4  # the kernel reads ahead, here and there the whole file
    assert third < 0.1


def test_the_order_is_that_of_numbers_not_of_digits(model: Path) -> None:
    names = [file.name for file in weight_files(model)]
    assert names == [f"model-{number}-of-10.safetensors" for number in (1, 2, 10)]


def test_it_can_be_stopped(model: Path) -> None:
    stop = threading.Event()
    stop.set()
    done = prefetch(model, stop=stop)
    assert (done.bytes, done.why) == (0, "stopped")


def test_a_file_that_cannot_be_read_is_left_to_the_loader(model: Path) -> None:
    broken = model / "model-2-of-10.safetensors"
    broken.unlink()
    broken.symlink_to(model / "gone")
    done = prefetch(model)
    assert (done.bytes, done.of_bytes) == (2 * SHARD_BYTES, 2 * SHARD_BYTES)


def test_loaders_that_go_another_way_are_spared(model: Path) -> None:
    assert prefetch(model, load_format="dummy").bytes == 0
    assert resident(weight_files(model)[0]) < 0.1


def test_what_lies_in_memory_is_not_copied_there() -> None:
    folder = Path("/dev/shm")
    if file_system(folder) != "tmpfs":
        pytest.skip("there is no tmpfs at /dev/shm")
    file = folder / f"sealed-vllm-test-{os.getpid()}.gguf"
    file.write_bytes(bytes(PAGE))
    try:
        done = prefetch(file)
    finally:
        file.unlink()
    assert (done.bytes, done.of_bytes, done.why) == (0, PAGE, "tmpfs is memory already")


# --- on a volume ---


@pytest.fixture
def volume(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """A way to mount the model by FUSE, each time with nothing of it in the page cache."""
    point = tmp_path_factory.mktemp("volume")
    with contextlib.ExitStack() as mounts:

        def mount() -> Path:
            mounts.close()
            command = [sys.executable, str(FUSE), str(model), str(point), "0.004"]
            served = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            mounts.callback(served.communicate)  # ends its input, and so the mount
            assert served.stdout
            if (said := served.stdout.readline()) != "mounted\n":
                pytest.skip(f"FUSE cannot be mounted here: {said.strip()}")
            return point

        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            pytest.skip("there is no FUSE here")
        yield mount


def test_from_a_volume_it_is_faster_than_one_reader(volume: Callable[[], Path]) -> None:
    began = time.perf_counter()
    for file in weight_files(volume()):
        assert file.read_bytes()
    alone_s = time.perf_counter() - began

    folder = volume()
    done = prefetch(folder)
    assert done.bytes == 3 * SHARD_BYTES
    assert done.seconds < alone_s / 2  # a quarter, where nothing else runs
    assert min(resident(file) for file in weight_files(folder)) > 0.99


def test_a_volume_is_known_for_what_it_is(volume: Callable[[], Path]) -> None:
    folder = volume()
    assert file_system(folder) == "fuse.test"
    assert load_strategy(folder, {}) == "prefetch"


# --- where the files lie ---


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        ("{0} fuse", "fuse"),
        ("/ ext4\n{0} fuse.mfs", "fuse.mfs"),
        # The longest prefix, whatever comes first, and the last of two on one place.
        ("{0} nfs4\n/ ext4", "nfs4"),
        ("{0} nfs4\n{0} ext4", "ext4"),
        # A name that only begins alike is another place.
        ("/ ext4\n{1} fuse", "ext4"),
        ("{1} fuse", ""),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(
    tmp_path: Path, lines: str, kind: str
) -> None:
    folder = tmp_path / "a volume"
    folder.mkdir()
    mounts = tmp_path / "mounts"
    place = str(folder).replace(" ", "\\040")
    rows = (line.format(place, place[:-2]).split() for line in lines.splitlines())
    mounts.write_text("".join(f"source {point} {kind} rw 0 0\n" for point, kind in rows))
    assert file_system(folder, mounts) == kind


def test_of_a_snapshot_it_is_that_of_the_files_behind_the_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "volume", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "abc").write_bytes(b"x")
    (snapshot / "model.safetensors").symlink_to(blobs / "abc")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"m / ext4 rw 0 0\nm {blobs} fuse rw 0 0\n")
    assert file_system(snapshot, mounts) == "fuse"


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("fuse", {}, "prefetch"),
        ("fuse.mfs", {"LOAD_FORMAT": "safetensors"}, "prefetch"),
        ("nfs", {}, "prefetch"),
        ("ext4", {}, None),
        ("overlay", {}, None),
        ("fuseblk", {}, None),  # a disk of this machine with a foreign format
        # The person's own choice.
        ("fuse", {"SAFETENSORS_LOAD_STRATEGY": "lazy"}, None),
        ("fuse", {"LOAD_FORMAT": "runai_streamer"}, None),
        ("fuse", {"MODEL_LOADER_EXTRA_CONFIG": '{"enable_multithread_load": true}'}, None),
        ("fuse", {"MODEL_LOADER_EXTRA_CONFIG": '{"num_threads": 4}'}, "prefetch"),
        ("fuse", {"MODEL_LOADER_EXTRA_CONFIG": "{broken"}, "prefetch"),
    ],
)
def test_vllm_prefetches_from_volumes(
    tmp_path: Path, kind: str, options: Mapping[str, str], expected: str | None
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"m / {kind} rw 0 0\n")
    assert load_strategy(tmp_path, options, mounts) == expected


def test_vllm_prefetches_no_more_than_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    mounts = tmp_path / "mounts"
    mounts.write_text("m / fuse rw 0 0\n")
    monkeypatch.setattr(machine_memory, "available_bytes", lambda: 1000)
    assert load_strategy(tmp_path, {}, mounts) is None
    monkeypatch.setattr(machine_memory, "available_bytes", lambda: 1200)
    assert load_strategy(tmp_path, {}, mounts) == "prefetch"
    assert load_strategy(tmp_path / "none", {}, mounts) is None


def test_the_threads_share_the_work(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy: set[int] = set()
    together = threading.Barrier(3, timeout=20)
    preadv = os.preadv

    def seen(*args: int) -> int:
        if threading.get_ident() not in busy:
            busy.add(threading.get_ident())
            together.wait()
        return preadv(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", seen)
    began = time.monotonic()
    assert prefetch(model, threads=3).bytes == 3 * SHARD_BYTES
    assert len(busy) == 3 and time.monotonic() - began < 20
