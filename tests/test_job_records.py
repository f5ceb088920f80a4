"""Records of submitted jobs as files: modes, order, damage, forgetting."""

import json
import os
import stat
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from client_config import ClientSettings
from errors import RecordError
from job_records import KEPT_S, TTL_S, JobRecords, SubmittedJob

NOW = 1_800_000_000
SECRET = "s" * 43


def job(number: int = 1, **given: Any) -> SubmittedJob:
    return SubmittedJob(
        **{
            "endpoint_id": "local",
            "key_id": "0123456789abcdef",
            "request_id": f"{number:032x}",
            "response_secret": SECRET,
            "route": "generate",
            "issued_at": NOW + number,
            "expires_at": NOW + number + TTL_S,
            **given,
        }
    )


def records(folder: Path, now: float = NOW) -> JobRecords:
    return JobRecords(folder / "state", now=lambda: now)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_record_is_found_by_the_job_s_id(tmp_path: Path) -> None:
    kept = records(tmp_path)
    assert kept.find("a-u1") is None
    kept.add(job())
    assert kept.find("a-u1") is None
    assert kept.unconfirmed() == [job()]
    confirmed = kept.confirm(job(), "a-u1")
    assert confirmed == replace(job(), id="a-u1")
    assert records(tmp_path).find("a-u1") == confirmed
    assert kept.unconfirmed() == []
    kept.discard(confirmed)
    kept.discard(confirmed)
    assert kept.find("a-u1") is None
    assert list(kept.folder.iterdir()) == []


def test_nobody_else_can_read_it_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    real_open = os.open

    def look(path: Any, flags: int, *args: Any, **more: Any) -> int:
        fd = real_open(path, flags, *args, **more)
        if flags & os.O_CREAT:
            modes.append((stat.S_IMODE(os.fstat(fd).st_mode), bool(flags & os.O_EXCL)))
        return fd

    monkeypatch.setattr(os, "open", look)
    old = os.umask(0)
    try:
        records(tmp_path).add(job())
    finally:
        os.umask(old)
    assert modes == [(0o600, True)]
    assert mode(tmp_path / "state") == 0o700
    assert mode(records(tmp_path).path(job())) == 0o600


def test_it_is_on_disk_before_the_job_goes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def note(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", note)
    kept = records(tmp_path)
    kept.add(job())
    assert synced == [str(tmp_path), str(kept.path(job())), str(kept.folder)]
    kept.confirm(job(), "a")
    assert synced[3:] == [str(kept.folder)]


def test_the_secret_is_in_no_repr_and_not_among_what_is_shown() -> None:
    for secret in (job(), job(response_secret="r" * 43, reply_seed=SECRET)):
        assert SECRET not in repr(secret)
        assert SECRET not in str(secret.public())
    assert asdict(job()).keys() - job().public().keys() == {"response_secret", "reply_seed"}


@pytest.mark.parametrize("job_id", ["../../x", "/etc/x", ".", "..", "a/b", "ä b", "%2e"])
def test_an_id_is_never_a_path(tmp_path: Path, job_id: str) -> None:
    kept = records(tmp_path)
    kept.add(job())
    confirmed = kept.confirm(job(), job_id)
    assert kept.find(job_id) == confirmed
    assert [job.id for job in kept.listed()[0]] == [job_id]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert len(list(kept.folder.iterdir())) == 1


def test_an_id_that_no_file_can_have(tmp_path: Path) -> None:
    kept = records(tmp_path)
    kept.add(job())
    with pytest.raises(RecordError, match="File name too long"):
        kept.confirm(job(), "x" * 300)
    with pytest.raises(RecordError, match="File name too long"):
        kept.find("x" * 300)
    assert kept.unconfirmed() == [job()]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"\xff", "is not a text file"),
        (b"{", "is damaged"),
        (b"[]", "is damaged"),
        (b"{}", "is damaged"),
        (b'{"request_id": "%s"}' % SECRET.encode(), "is damaged"),
        (b"x" * 100_000, "is too large"),
    ],
)
def test_what_is_no_record_is_told_without_quoting_it(
    tmp_path: Path, content: bytes, told: str
) -> None:
    kept = records(tmp_path)
    kept.add(job())
    path = kept.path(kept.confirm(job(), "a"))
    path.write_bytes(content)
    with pytest.raises(RecordError, match=told) as raised:
        kept.find("a")
    assert str(path) in str(raised.value) and SECRET not in str(raised.value)
    found, faults = kept.listed()
    assert found == [] and [str(fault) for fault in faults] == [str(raised.value)]


@pytest.mark.parametrize("name", ["key_id", "request_id", "response_secret", "issued_at"])
def test_a_member_of_the_wrong_form_is_damage(tmp_path: Path, name: str) -> None:
    kept = records(tmp_path)
    kept.add(job())
    path = kept.path(kept.confirm(job(), "a"))
    path.write_text(json.dumps({**json.loads(path.read_text()), name: "x\n"}))
    with pytest.raises(RecordError, match="is damaged"):
        kept.find("a")


def test_a_record_that_others_can_read_is_refused(tmp_path: Path) -> None:
    kept = records(tmp_path)
    kept.add(job())
    path = kept.path(kept.confirm(job(), "a"))
    path.chmod(0o640)
    with pytest.raises(RecordError, match=rf"read by others \(mode 0640\); run: chmod 600 {path}"):
        kept.find("a")


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    kept = records(tmp_path)
    kept.folder.mkdir(mode=0o755)
    with pytest.raises(RecordError, match=f"run: chmod 700 {kept.folder}"):
        kept.add(job())
    assert list(kept.folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(RecordError, match=r"no record can be kept in .*state"):
        records(tmp_path).add(job())


def test_a_record_is_never_written_over(tmp_path: Path) -> None:
    records(tmp_path).add(job())
    with pytest.raises(RecordError, match="File exists"):
        records(tmp_path).add(job(route="/v1/embeddings"))
    assert records(tmp_path).unconfirmed() == [job()]


def test_records_are_listed_oldest_first(tmp_path: Path) -> None:
    kept = records(tmp_path)
    for number in (2, 3, 1):
        kept.add(job(number))
    kept.confirm(job(2), "two")
    assert [found.request_id[-1] for found in kept.listed()[0]] == ["1", "2", "3"]


def test_a_record_is_forgotten_when_the_platform_cannot_have_the_answer(tmp_path: Path) -> None:
    kept = records(tmp_path)
    for number, ttl_s in ((1, 60), (2, TTL_S)):
        kept.add(job(number, expires_at=NOW + ttl_s))
        kept.confirm(job(number), f"job-{number}")
    kept.add(job(3, expires_at=NOW + 60))
    damaged = kept.folder / "damaged.job"
    damaged.write_text("{")
    damaged.chmod(0o600)
    os.utime(damaged, (NOW, NOW))
    other = kept.folder / "notes.txt"
    other.write_text("mine")

    def left(now: float) -> set[str]:
        records(tmp_path, now).forget()
        return {path.name for path in kept.folder.iterdir()}

    everything = {"job-1.job", "job-2.job", f"{3:032x}.request", "damaged.job", "notes.txt"}
    assert left(NOW + 60 + KEPT_S) == everything
    assert left(NOW + 60 + KEPT_S + 1) == {"job-2.job", "damaged.job", "notes.txt"}
    assert left(NOW + TTL_S + KEPT_S) == {"job-2.job", "damaged.job", "notes.txt"}
    assert left(NOW + TTL_S + KEPT_S + 1) == {"notes.txt"}


def test_adding_one_forgets_the_old_ones(tmp_path: Path) -> None:
    records(tmp_path).add(job())
    later = records(tmp_path, NOW + TTL_S + KEPT_S + 2)
    later.add(job(2))
    assert later.unconfirmed() == [job(2)]


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"CLIENT_STATE_DIR": "/a", "XDG_STATE_HOME": "/b"}, "/a"),
        ({"XDG_STATE_HOME": "/b"}, "/b/sealed-vllm"),
        ({"XDG_STATE_HOME": "b"}, "~/.local/state/sealed-vllm"),
        ({}, "~/.local/state/sealed-vllm"),
    ],
)
def test_where_records_are_kept(environ: dict[str, str], folder: str) -> None:
    needed = {
        "RUNPOD_ENDPOINT_ID": "local",
        "RUNPOD_API_KEY": "any",
        "RUNPOD_API_BASE": "http://127.0.0.1:1",
    }
    settings = ClientSettings.from_environ({**needed, **environ}, with_key=False)
    assert settings.state_dir == Path(folder)
    assert JobRecords(settings.state_dir).folder == Path(folder).expanduser()
