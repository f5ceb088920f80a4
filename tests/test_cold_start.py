"""A start of the real worker on an empty volume: what it records, and what runs beside what."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import readiness
import readiness_report
from local_runpod import LocalRunpod
from tests.adapters import make_adapter
from tests.hub import Hub
from tests.workers import MODEL, SERVED, Caller, RunningWorker, saying, tokens

pytestmark = pytest.mark.engine

DOWNLOAD_S = 3.0
ADAPTER = "org/tiny-lora"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volume")


@pytest.fixture(scope="module")
def worker(volume: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    """A worker that has fetched its model from a Hub that needed some seconds, and an adapter."""
    files, adapter = content(MODEL), make_adapter(tmp_path_factory.mktemp("adapter") / "made")
    size_bytes = sum(map(len, files.values()))
    with Hub(bytes_per_s=size_bytes / DOWNLOAD_S).serving() as hub, LocalRunpod() as platform:
        hub.add("org/tiny", files)
        hub.add(ADAPTER, content(adapter))
        with RunningWorker(
            platform,
            tmp_path_factory.mktemp("worker"),
            MODELS=f"org/tiny,{ADAPTER}",
            HF_HOME=str(volume),
            HF_ENDPOINT=hub.url,
        ) as worker:
            worker.ready()
            yield worker


@pytest.fixture(scope="module")
def record(worker: RunningWorker, volume: Path) -> dict[str, Any]:
    (record,) = readiness.kept(volume / "sealed-vllm" / "starts")
    return record


def test_the_record_names_every_phase_and_what_was_downloaded(record: dict[str, Any]) -> None:
    assert record["worker"] == "pod-1"
    assert record["model"] == "org/tiny"
    assert record["source"] == "hub"
    assert readiness_report.spans(record).keys() >= {
        "imports",
        "resolve",
        "verify",
        "download",
        "engine core",
        "weights",
        "warm-up",
        "application",
        "first generation",
        "adapters",
        "taking jobs",
    }
    download, _ = [phase for phase in record["phases"] if phase["name"] == "download"]
    assert download["bytes"] > MODEL.joinpath("model.safetensors").stat().st_size
    rate = download["bytes"] / 1e6 / download["took_s"]
    assert download["MB_per_s"] == pytest.approx(rate, rel=0.1)


def test_the_log_shows_the_same_as_a_table_and_as_a_line(
    worker: RunningWorker, record: dict[str, Any]
) -> None:
    (line,) = [line for line in worker.log.splitlines() if " start={" in line]
    assert {"worker": "pod-1", **json.loads(line.partition("start=")[2])} == record
    assert f"ready after {record['ready_s']:.1f} s" in worker.log


def test_download_and_import_run_beside_each_other(record: dict[str, Any]) -> None:
    spans = readiness_report.spans(record)
    imports, download = spans["imports"], spans["download"]
    assert download[1] - download[0] >= DOWNLOAD_S * 0.9
    # Compared with one after the other, the shorter of the two is saved, but for half a second.
    assert spans["engine core"][0] <= max(imports[1], download[1]) + 0.5
    assert min(imports[1], download[1]) - max(imports[0], download[0]) >= (
        min(imports[1] - imports[0], download[1] - download[0]) - 0.5
    )


def test_a_worker_that_was_started_so_answers(worker: RunningWorker) -> None:
    with Caller(worker.platform, worker.key) as caller:
        assert caller.ask("generate", saying("hello")).text == "hello"
        base, adapted = (
            caller.ask("generate", {**tokens(16), "model": name}).text for name in (SERVED, ADAPTER)
        )
        assert base != adapted
