"""The lease: one holder at a time, the dead succeeded, the sleeping told, clocks not trusted."""

import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import model_lease
from model_lease import UNKNOWN, Claim, Lease, Pace, holder_of, leases
from tests.wait import until

ROOT = Path(model_lease.__file__).parent
PACE = Pace(heartbeat_s=0.2, stale_s=1.2)
LOG = logging.getLogger("lease")

HOLD = """
import logging, sys
from pathlib import Path
from model_lease import Claim, Pace
lease = Claim(Path(sys.argv[1]), "other", Pace(0.2, 1.2), logging.getLogger()).take()
print("held", flush=True)
while not lease.lost:
    lease._ended.wait(0.02)
print("lost", flush=True)
"""


def claim(folder: Path, pace: Pace = PACE) -> Claim:
    return Claim(folder, "me", pace, LOG)


def taken(claim: Claim) -> Lease:
    """Return the lease that a claim gets, asking until it does."""
    lease: list[Lease] = []

    def ask() -> bool:
        lease.extend(filter(None, [claim.take()]))
        return bool(lease)

    until(ask, 10, "the lease was not granted")
    return lease[0]


@contextlib.contextmanager
def other_process(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Hold the lease in another process."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def kept(action: Callable[[], object], every_s: float = 0.1) -> Iterator[None]:
    """Repeat an action in the background."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every_s):
            action()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_one_of_many_gets_it_and_the_next_after_its_release(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda _: claim(tmp_path).take(), range(64)))
    (lease,) = filter(None, got)
    named = holder_of(leases(tmp_path)[-1])
    assert (named.host, named.pid, named.worker) == (socket.gethostname(), os.getpid(), "me")
    assert str(named) == f"worker me on {socket.gethostname()} (pid {os.getpid()})"
    lease.release()
    assert leases(tmp_path) == []
    with taken(claim(tmp_path)) as second:
        assert not second.lost


def test_a_living_holder_keeps_it_for_longer_than_its_silence_may_last(tmp_path: Path) -> None:
    with taken(claim(tmp_path)):
        waiting = claim(tmp_path)
        ends = time.monotonic() + 3 * PACE.stale_s
        while time.monotonic() < ends:
            assert waiting.take() is None
            time.sleep(0.02)


def test_the_killed_are_succeeded_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with other_process(tmp_path) as process:
        claims = [claim(tmp_path) for _ in range(8)]
        assert [each.take() for each in claims] == [None] * 8
        process.kill()
        process.wait()
        last_beat = leases(tmp_path)[-1].stat().st_mtime
        with ThreadPoolExecutor(8) as pool:
            got: list[Lease] = []
            while not got:
                got = [lease for lease in pool.map(lambda each: each.take(), claims) if lease]
    assert time.time() - last_beat >= PACE.stale_s
    assert len(got) == 1
    assert f"worker other on {socket.gethostname()} (pid {process.pid}) no longer" in caplog.text
    assert [each.take() for each in claims] == [None] * 8
    got[0].release()
    assert leases(tmp_path) == []


def test_a_holder_that_slept_learns_that_it_was_succeeded(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        with taken(claim(tmp_path)) as lease:
            process.send_signal(signal.SIGCONT)
            assert process.stdout is not None
            assert process.stdout.readline() == "lost\n"
            assert not lease.lost


def test_one_that_was_succeeded_takes_nothing_away_from_its_successor(tmp_path: Path) -> None:
    lease = taken(claim(tmp_path))
    later = tmp_path / "lease.2"
    later.write_bytes(leases(tmp_path)[0].read_bytes().replace(b'"me"', b'"later"'))
    until(lambda: lease.lost)
    lease.release()
    assert leases(tmp_path)[-1] == later


def test_a_lease_that_somebody_removed_is_lost(tmp_path: Path) -> None:
    lease = taken(claim(tmp_path))
    leases(tmp_path)[0].unlink()
    until(lambda: lease.lost)


@pytest.mark.parametrize("off_s", [-3 * PACE.stale_s, 3600.0])
def test_a_holder_whose_clock_is_off_is_believed_as_long_as_it_moves(
    tmp_path: Path, off_s: float
) -> None:
    lease = tmp_path / "lease.1"
    lease.touch()
    waiting = claim(tmp_path)

    def beat() -> None:
        os.utime(lease, (time.time() + off_s,) * 2)

    with kept(beat):
        ends = time.monotonic() + 3 * PACE.stale_s
        while time.monotonic() < ends:
            assert waiting.take() is None
            time.sleep(0.02)
    with taken(waiting):
        assert holder_of(lease) == UNKNOWN


def test_the_long_dead_hold_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "lease.7").write_text("{}")
    os.utime(tmp_path / "lease.7", (time.time() - 3600,) * 2)
    lease = claim(tmp_path).take()
    assert lease is not None
    assert [path.name for path in leases(tmp_path)] == ["lease.7", "lease.8"]
    lease.release()
    assert leases(tmp_path) == []


def test_time_in_which_nobody_watched_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The volume stood still for a minute, for the holder as for those who wait."""
    (tmp_path / "lease.1").touch()
    waiting = claim(tmp_path, Pace(heartbeat_s=3, stale_s=30))
    assert waiting.take() is None
    began = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: began + 60)
    assert waiting.take() is None


@pytest.mark.parametrize(
    "place",
    ["file/below", "nowhere/below", "/proc/nope/below", "/sys/fs/nope", "/sys/fs"],
    ids=["below-a-file", "below-a-dangling-link", "procfs", "no-folder-allowed", "read-only"],
)
def test_where_no_lease_can_be_written_everybody_goes_on(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "not" / "there")
    for _ in range(2):
        lease = claim(tmp_path / place).take()
        assert lease is not None
        assert not lease.lost
        lease.release()


def test_a_lease_that_cannot_be_succeeded_is_waited_for_no_longer_than_its_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead worker left it before the volume was attached read-only."""
    (tmp_path / "lease.1").touch()
    waiting = claim(tmp_path)

    def refused(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "utime", refused)
    with taken(waiting) as lease:
        assert not lease.lost


def test_a_link_to_nothing_is_no_lease_for_ever(tmp_path: Path) -> None:
    (tmp_path / "lease.1").symlink_to(tmp_path / "gone")
    with taken(claim(tmp_path)) as lease:
        assert lease.succeeds
