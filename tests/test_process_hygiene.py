"""What a process leaves for others to look at: shown on real processes, beside unsealed ones."""

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from process_hygiene import TemporaryFolder
from tests.wait import until

ROOT = Path(__file__).resolve().parent.parent
SECRET = "c2VjcmV0IG9mIHRoaXMgdGVzdA"
# Root as containers have it: without CAP_SYS_PTRACE, CAP_SYS_ADMIN and CAP_PERFMON.
_DROP = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
data = (ctypes.c_uint32 * 6)()
assert libc.capget(header, data) == 0
for capability in (19, 21, 38):
    word, bit = divmod(capability, 32)
    data[3 * word] &= ~(1 << bit)
    data[3 * word + 1] &= ~(1 << bit)
assert libc.capset(header, data) == 0
"""
_LOOK = """
for name in ("environ", "maps"):
    try:
        print(name, len(open(f"/proc/{sys.argv[1]}/{name}", "rb").read()) > 0)
    except PermissionError:
        print(name, "refused")
"""


def seen_of(program: str) -> tuple[str, str]:
    """Run a program and return what others see of it, and of a process that it has forked."""
    script = f"{_DROP}\nimport process_hygiene\n{program}\n"
    script += "os.write(1, b'%d\\n' % os.fork())\n"  # by both, each in one piece
    process = subprocess.Popen(
        [sys.executable, "-c", script + "sys.stdin.read()"],
        cwd=ROOT,
        env={**os.environ, "SECRET": SECRET},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout and process.stdin
        child = max(int(process.stdout.readline()) for _ in range(2))
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert ("Max core file size        0                    0 " in limits) == bool(program)
        return look(process.pid), look(child)
    finally:
        process.communicate()


def look(pid: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _DROP + _LOOK, str(pid)], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_nobody_looks_into_a_process_or_its_forks() -> None:
    assert seen_of("") == ("environ True\nmaps True\n",) * 2
    sealed = seen_of("process_hygiene.seal_off()")
    assert sealed == ("environ refused\nmaps refused\n",) * 2


def test_a_sealed_process_still_starts_others() -> None:
    program = (
        "import process_hygiene, subprocess, os; process_hygiene.seal_off()\n"
        "assert os.listdir('/proc/self/fd') and open('/proc/self/environ').read()\n"
        "print(subprocess.run(['echo', 'hello'], capture_output=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "b'hello\\n'\n", done.stderr


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a path as short as an operator's would be."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


class TestTheTemporaryFolder:
    def test_it_is_its_owners_alone_and_gone_at_the_end(self, short_path: Path) -> None:
        folder = TemporaryFolder(str(short_path))
        assert folder.path.parent == short_path
        assert folder.path.stat().st_mode & 0o777 == 0o700
        (folder.path / "socket").touch()
        folder.remove()
        assert not list(short_path.iterdir())

    def test_sockets_fit_into_it_wherever_it_was_to_be(self, short_path: Path) -> None:
        parent = short_path / ("long" * 25)
        parent.mkdir()
        folder = TemporaryFolder(str(parent))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder.path / str(uuid.uuid4())))
        folder.remove()
        assert not list(parent.iterdir())

    @pytest.mark.parametrize("name", ["long" * 25, "missing"])
    def test_what_is_passed_over_does_not_come_back_as_the_disk(
        self, short_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        parent = short_path / name
        if name != "missing":
            parent.mkdir()
        monkeypatch.setattr("process_hygiene.ROOM_BYTES", 2**62)
        monkeypatch.setenv("TMPDIR", str(parent))
        monkeypatch.setattr(tempfile, "tempdir", str(parent))
        folder = TemporaryFolder(str(parent))
        assert folder.path.parent == Path("/tmp")
        folder.remove()

    def test_it_lies_in_memory_where_there_is_room(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("process_hygiene.MEMORY", tmp_path)
        monkeypatch.setattr("process_hygiene.ROOM_BYTES", 1)
        folder = TemporaryFolder()
        assert folder.path.parent == tmp_path
        folder.remove()
        monkeypatch.setattr("process_hygiene.ROOM_BYTES", 2**62)
        folder = TemporaryFolder()
        assert folder.path.parent != tmp_path
        folder.remove()

    def test_it_is_made_again_where_another_worker_took_it_for_one_of_the_dead(
        self, short_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock = fcntl.flock

        def lock_too_late(file: TextIO, how: int) -> None:
            patch.undo()
            TemporaryFolder(str(short_path)).remove()
            lock(file, how)

        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", lock_too_late)
            folder = TemporaryFolder(str(short_path))
        assert list(short_path.iterdir()) == [folder.path]
        folder.remove()

    def test_what_a_killed_process_leaves_goes_when_its_children_have_gone(
        self, short_path: Path
    ) -> None:
        program = (
            "import os, sys, process_hygiene\n"
            "folder = process_hygiene.TemporaryFolder(sys.argv[1])\n"
            "if os.fork():\n"
            "    os.kill(os.getpid(), 9)\n"
            "print('forked', flush=True)\n"
            "sys.stdin.read()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(short_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout and process.stdin
        assert process.stdout.readline() == b"forked\n"
        assert process.wait(10) == -9
        (left,) = short_path.iterdir()
        TemporaryFolder(str(short_path)).remove()
        assert left.exists()  # a child still lives
        process.stdin.close()

        def swept() -> bool:
            TemporaryFolder(str(short_path)).remove()
            return not left.exists()

        until(swept, 10, "the folder of the dead is gone")
        process.stdout.close()
