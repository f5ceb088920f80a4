"""Every fault of a download, at every step of it: what passes is sat out, what stays is named.

Each case has a model of its own on one Hub, and all of them run side by side, since most of their
time is waiting.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import utils
from errors import ModelError, ModelGated, ModelIncomplete, ModelOffline
from hub_download import Patience
from tests.hub import FaultKind, Hub
from tests.test_utils import MODEL, NEEDED, SHARD_2, safetensors
from utils import Snapshot

ALWAYS = 99
PATIENCE = Patience(attempts=2, backoff_s=0.05, stall_s=8)

LISTING = "/api/models/{name}/revision/*"
TREE = "/api/models/{name}/tree/*"
HEAD = f"/{{name}}/resolve/*/{SHARD_2}"
BODY = f"/cdn/{{name}}/*{SHARD_2}"


@dataclass(frozen=True)
class Case:
    """A fault, and what becomes of the download: whole files, or an error with these words."""

    kind: FaultKind
    path: str = BODY
    times: int = 1
    more: dict[str, Any] = field(default_factory=dict)
    error: type[ModelError] | None = None
    says: str = ""

    def __str__(self) -> str:
        what = f"{self.more['status']}" if self.kind == "status" else self.kind
        step = {LISTING: "listing", TREE: "tree", HEAD: "head", BODY: "body"}[self.path]
        return f"{what}-{step}-{'once' if self.times == 1 else 'always'}"


def status(code: int, path: str, error: type[ModelError] | None = None, says: str = "") -> Case:
    return Case("status", path, ALWAYS if error else 1, {"status": code}, error, says)


CASES = [
    Case("cut", more={"after_bytes": 100_000}),
    Case("cut", BODY, ALWAYS, {"after_bytes": 100_000}, ModelOffline, "could not be downloaded"),
    Case("reset", more={"after_bytes": 100_000}),
    Case("reset", BODY, ALWAYS, {"after_bytes": 100_000}, ModelOffline, "broke off"),
    Case("short", more={"after_bytes": 100_000}),
    Case("short", BODY, ALWAYS, {"after_bytes": 100_000}, ModelIncomplete, "has size 100000"),
    Case("long", more={"after_bytes": 1000}),
    Case("long", BODY, ALWAYS, {"after_bytes": 1000}, ModelIncomplete, "incomplete after 2"),
    Case("stall", more={"after_bytes": 100_000}),
    Case("flip", more={"after_bytes": 100_000}),
    *(status(500, path) for path in (LISTING, TREE, HEAD, BODY)),
    *(status(429, path) for path in (LISTING, TREE, HEAD, BODY)),
    status(500, LISTING, ModelOffline, "500"),
    status(500, BODY, ModelOffline, "500"),
    status(429, BODY, ModelOffline, "429"),
    status(401, LISTING, ModelGated, "to nobody without a token (401): set HF_TOKEN"),
    status(401, HEAD, ModelGated, "to nobody without a token (401): set HF_TOKEN"),
    status(403, LISTING, ModelGated, "denies access"),
    status(403, HEAD, ModelGated, "denies access"),
    status(404, LISTING, ModelError, "404"),
    status(404, HEAD, ModelError, "404"),
    # A signed address that has run out; a new one is asked for.
    status(403, BODY),
    status(403, BODY, ModelOffline, "403"),
    status(404, BODY),
    status(401, BODY),
]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub with a model for each case, and its fault."""
    with Hub().serving() as hub:
        for case in CASES:
            name = f"org/{case}"
            hub.add(name, MODEL)
            path = case.path.format(name=name)
            hub.fault(case.kind, path=path, times=case.times, **case.more)
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all of them."""
    return tmp_path_factory.mktemp("faults") / "hub"


@pytest.fixture(scope="module")
def outcomes(hub: Hub, cache: Path) -> Iterator[dict[str, "Future[Snapshot]"]]:
    """The downloads, under way."""

    def fetch(name: str) -> Snapshot:
        return utils.resolve(name, hub_cache=cache, endpoint=hub.url, patience=PATIENCE)

    with ThreadPoolExecutor(4) as pool:
        yield {str(case): pool.submit(fetch, f"org/{case}") for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fault(
    case: Case, outcomes: dict[str, "Future[Snapshot]"], hub: Hub, cache: Path
) -> None:
    outcome = outcomes[str(case)]
    if case.error is not None:
        with pytest.raises(ModelError) as raised:
            outcome.result(120)
        assert type(raised.value) is case.error
        assert case.says in str(raised.value)
        assert "s3cret" not in str(raised.value)
        return
    folder = outcome.result(120).path
    damaged = {file for file in NEEDED if (folder / file).read_bytes() != MODEL[file]}
    # The Hub library hashes nothing: a flipped byte is found on request, and by nothing else.
    assert damaged == ({SHARD_2} if case.kind == "flip" else set())
    verdict = utils.verify(f"org/{case}", hub_cache=cache, sha256=True)
    assert set(verdict.faults) == damaged
    assert not list((folder.parent.parent / "blobs").glob("*.incomplete"))


def test_every_fault_has_happened(outcomes: dict[str, "Future[Snapshot]"], hub: Hub) -> None:
    for outcome in outcomes.values():
        outcome.exception(120)
    assert [fault for fault in hub.faults if fault.times in (1, ALWAYS)] == []


def test_slow_is_not_silent(hub: Hub, cache: Path) -> None:
    """A download may take longer than the watchdog bears silence."""
    hub.add("org/slow", {**MODEL, SHARD_2: safetensors(1_000_000)})
    hub.fault("slow", path=f"/cdn/org/slow/*{SHARD_2}", bytes_per_s=250_000)
    began = time.monotonic()
    patience = Patience(attempts=1, stall_s=2.5)
    utils.resolve("org/slow", hub_cache=cache, endpoint=hub.url, patience=patience)
    assert time.monotonic() - began > 4 > patience.stall_s
    assert hub.count(f"GET /cdn/org/slow/*{SHARD_2}") == 1
