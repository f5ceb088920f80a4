"""The record of a start: what it holds, how it is shown, and where it is kept."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import engine_phases
import readiness
import readiness_report
from readiness import KEPT, PHASES, Readiness

ROOT = Path(__file__).resolve().parent.parent


def a_start(**about: str) -> Readiness:
    """A start in which the download ran beside the imports."""
    record = Readiness(started_at=1_000.0)
    record.add("imports", 1_000.5, 1_006.5)
    record.add("download", 1_000.7, 1_004.7, {"bytes": 200_000_000, "MB_per_s": 50.0})
    record.add("engine core", 1_006.5, 1_016.5)
    record.add("weights", 1_010.0, 1_012.0)
    record.about |= about
    return record


def test_a_phase_is_timed_from_the_process_s_begin() -> None:
    record = Readiness()
    with record.phase("resolve") as facts:
        facts["bytes"] = 3
    (phase,) = record.phases
    assert 0 < phase.began_s < 3600
    assert 0 <= phase.took_s < 5
    assert phase.facts == {"bytes": 3}


def test_a_phase_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="no such phase: lunch"):
        Readiness().add("lunch", 0, 1)


def test_the_line_is_json_with_the_phases_in_order() -> None:
    line = a_start(model="org/name").line()
    record = json.loads(line)
    assert "\n" not in line
    assert record["ready_s"] == 16.5
    assert record["model"] == "org/name"
    assert [phase["name"] for phase in record["phases"]] == [
        name for name in PHASES if name in ("imports", "download", "engine core", "weights")
    ]
    download = record["phases"][1]
    assert (download["began_s"], download["took_s"], download["bytes"]) == (0.7, 4.0, 200_000_000)


def test_the_table_says_what_each_phase_took() -> None:
    table = a_start().table().splitlines()
    assert table[0] == "ready after 16.5 s"
    (download,) = [line for line in table if line.startswith("download")]
    assert download.split() == ["download", "0.7s", "4.0s", "bytes=200000000", "MB_per_s=50.0"]


def test_a_record_is_kept_and_the_oldest_go(tmp_path: Path) -> None:
    for number in range(KEPT + 3):
        Readiness(started_at=1_000.0 + number).keep(tmp_path, f"pod/{number}")
    kept = readiness.kept(tmp_path)
    assert len(kept) == KEPT
    assert kept[-1]["worker"] == f"pod/{KEPT + 2}"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * KEPT


@pytest.mark.parametrize("content", ["", "{", "[]", '{"form": 2, "phases": []}', '{"form": 1}'])
def test_what_is_no_record_is_passed_over(tmp_path: Path, content: str) -> None:
    a_start().keep(tmp_path, "pod")
    (tmp_path / "20200101T000000Z-odd.json").write_text(content)
    assert len(readiness.kept(tmp_path)) == 1


def test_the_report_shows_starts_side_by_side_and_bars_of_the_last(tmp_path: Path) -> None:
    for number, source in enumerate(("hub", "cache")):
        start = a_start(model="org/name", source=source)
        start.started_at += number
        start.keep(tmp_path, f"pod-{number}")
    text = readiness_report.report(readiness.kept(tmp_path))
    assert text.splitlines()[0].split() == ["pod-0", "pod-1"]
    assert "hub" in text and "cache" in text
    assert "50.0 MB/s" in text
    bars = {
        line.split("│")[0].strip(): line.split("│")[1] for line in text.splitlines() if "│" in line
    }
    # In the picture, too, the download ran beside the imports and the engine came after both.
    assert bars["engine core"].index("█") > bars["download"].rindex("█")
    assert bars["download"].index("█") < bars["imports"].rindex("█")


def test_the_command_reports_what_the_volume_holds(tmp_path: Path) -> None:
    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, str(ROOT / "utils.py"), "report", *words],
            env={**os.environ, "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    empty = run()
    assert (empty.returncode, empty.stdout.strip()) == (
        0,
        "no start has been recorded on this volume yet",
    )
    a_start(model="org/name").keep(tmp_path / "sealed-vllm" / "starts", "pod-1")
    picture = tmp_path / "starts.png"
    shown = run("--plot", str(picture))
    assert shown.returncode == 0, shown.stderr
    assert "ready after" in shown.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_vllm_tells_is_taken_from_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "phases"
    path.touch()
    monkeypatch.setenv(engine_phases.VARIABLE, str(path))
    for created in (1_010.0, 1_020.0):  # two workers of a tensor parallel engine
        record = logging.LogRecord(
            "vllm.loader", logging.INFO, "", 0, "Loading weights took %.2f seconds", (4.0,), None
        )
        record.created = created
        assert engine_phases.PhaseFilter().filter(record)
    assert engine_phases.noted(path) == {"weights": (1_006.0, 1_020.0)}
