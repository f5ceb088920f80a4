"""Two starts of the real worker with compilation on: one volume, and for each a disk of its own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from keys import generate_key
from local_runpod import LocalRunpod
from tests.wait import until
from tests.workers import Caller, RunningWorker, tokens

pytestmark = pytest.mark.engine


@contextmanager
def started(folder: Path, name: str, **settings: Any) -> Iterator[RunningWorker]:
    """Start a worker whose home, and so its local disk, is new."""
    with (
        LocalRunpod() as platform,
        RunningWorker(platform, folder, name, private=True, **settings) as worker,
    ):
        yield worker.ready()


def phases(worker: RunningWorker) -> dict[str, dict[str, Any]]:
    """Return the phases of the start, as its record tells them."""
    (line,) = [line for line in worker.log.splitlines() if "worker: start=" in line]
    return {phase["name"]: phase for phase in json.loads(line.partition("start=")[2])["phases"]}


def compiled(worker: RunningWorker) -> dict[str, int]:
    """Return the machine code on the worker's local disk, and when it was made."""
    local = worker.folder / "XDG_CACHE_HOME/sealed-vllm/compile/0/inductor"
    return {str(path.relative_to(local)): int(path.stat().st_mtime) for path in local.rglob("*.so")}


def test_a_second_worker_compiles_nothing_again(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("c")  # short: vLLM's sockets lie below it
    settings = {
        "ENFORCE_EAGER": "false",
        "HF_HOME": str(folder / "volume"),
        "key": generate_key(),
    }
    with started(folder, "first", **settings) as first:
        until(lambda: "compile cache: published" in first.log, 30, "the archive")
        made, took_s = compiled(first), phases(first)["compile"]["took_s"]
        with Caller(first.platform, first.key) as caller:
            assert caller.ask("generate", tokens(2, logprobs=3)).complete
        assert compiled(first) == made, "somebody waited while it compiled"
    with started(folder, "second", **settings) as second:
        assert made and compiled(second) == made
        assert phases(second)["compile cache"]["files"] >= len(made)
        # Two to six times, depending on what else the machine does.
        assert phases(second)["compile"]["took_s"] < took_s
