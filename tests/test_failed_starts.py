"""Starts that do not come up: one that failed once is told from one that fails again and again."""

import logging
import os
import time
from pathlib import Path

import pytest

from failed_starts import FORGOTTEN_S, SILENT, FailedStarts

log = logging.getLogger("worker")


def begin(folder: Path, worker: str = "pod-1", endpoint: str = "endpoint") -> FailedStarts:
    failed_starts = FailedStarts(folder, endpoint, worker)
    failed_starts.begin(log)
    return failed_starts


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    caplog.clear()
    return found


def test_once_is_told_from_again_and_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(tmp_path).keep_reason("ModelGated: no access", log)
    assert messages(caplog) == []
    begin(tmp_path)  # killed
    ((level, text),) = messages(caplog)
    assert level == "WARNING"
    assert "the start before this one failed, once" in text
    assert "no access" in text
    third = begin(tmp_path)
    ((level, text),) = messages(caplog)
    assert level == "WARNING"
    assert "2 starts in a row have failed on this worker before this one, since 20" in text
    assert SILENT in text
    third.keep_reason("ConfigError: wrong", log)
    ((level, text),) = messages(caplog)
    assert level == "ERROR"
    assert "3 starts in a row have failed on this worker with this one" in text
    begin(tmp_path)
    ((level, text),) = messages(caplog)
    assert level == "ERROR"
    assert "3 starts in a row" in text
    assert "ConfigError: wrong" in text


def test_a_good_start_clears_the_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        begin(tmp_path)
    good = begin(tmp_path)
    good.clear()
    assert not list(tmp_path.iterdir())
    caplog.clear()
    good.keep_reason("EngineDead: later, which is no matter of the start", log)
    good.withdraw()
    begin(tmp_path)
    assert messages(caplog) == []


def test_one_that_was_told_to_end_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(tmp_path).withdraw()
    assert not list(tmp_path.iterdir())
    begin(tmp_path).keep_reason("first", log)
    begin(tmp_path).withdraw()
    caplog.clear()
    begin(tmp_path)
    ((_, text),) = messages(caplog)
    assert "failed, once" in text
    assert text.endswith("first")


def test_workers_and_endpoints_are_kept_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(4):  # of which the last may still be on its way
        begin(tmp_path, "pod/1")
    caplog.clear()
    begin(tmp_path, "pod-2", "other")
    assert messages(caplog) == []
    begin(tmp_path, "pod-2")
    assert messages(caplog) == [
        ("WARNING", "3 starts have failed on other workers of this endpoint")
    ]
    begin(tmp_path, "pod-2")
    ((_, text),) = messages(caplog)
    assert "; 3 on other workers of this endpoint; the last one: " in text


def test_workers_that_start_at_once_have_not_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(6):
        begin(tmp_path, f"pod-{number}")
    assert messages(caplog) == []


def test_workers_that_are_gone_for_long_are_forgotten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        begin(tmp_path, "gone")
    (left,) = tmp_path.iterdir()
    long_ago = time.time() - FORGOTTEN_S - 60
    os.utime(left, (long_ago, long_ago))
    caplog.clear()
    begin(tmp_path)
    assert messages(caplog) == []
    assert not left.exists()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"failed": "x"}', "\udcff"])
def test_what_is_no_record_is_passed_over(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    begin(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content.encode(errors="surrogateescape"))
    begin(tmp_path)
    assert messages(caplog) == []


def test_a_volume_that_cannot_be_written_stops_no_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed_starts = begin(tmp_path / "file" / "folder")
    failed_starts.keep_reason("reason", log)
    failed_starts.withdraw()
    failed_starts.clear()
