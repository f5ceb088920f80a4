"""The suites of claims: what is counted, shown and kept, above all of what failed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers import ROOT
from tools import assurance
from tools.assurance import Claim

TESTS = """
import pytest

@pytest.mark.claim("holds", "It holds.")
def test_holds(claim):
    claim.trials(claim.count(short=3, full=10_000))
    claim.detail("in 1 ms")

@pytest.mark.claim("holds")
def test_holds_too():
    pass

@pytest.mark.claim("leaks", "It leaks.")
@pytest.mark.parametrize("ok", [True, False])
def test_leaks(claim, ok):
    claim.trial(True)
    claim.trial(ok)

@pytest.mark.claim("raises", "It raises.")
def test_raises(claim):
    claim.trial(True)
    assert 1 == 2

@pytest.fixture
def broken():
    raise RuntimeError

@pytest.mark.claim("broken", "It cannot be tried.")
def test_broken(broken):
    pass

@pytest.mark.claim("skipped", "It was not tried.")
def test_skipped():
    pytest.skip("not here")
"""


def test_trials_and_failures_of_two_processes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.claims", "-c", os.devnull, "-n", "2"),
            *("--rootdir", str(tmp_path), "--claims", str(tmp_path / "claims"), str(tmp_path)),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ASSURANCE": "full"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 1
    found = {claim.id: claim for claim in assurance.read(tmp_path / "claims")}
    told = {claim.id: (claim.trials, claim.failures) for claim in found.values()}
    assert told == {"holds": (10_001, 0), "leaks": (4, 1), "raises": (1, 1), "broken": (1, 1)}
    assert found["holds"].statement == "It holds."
    assert found["holds"].detail == "in 1 ms"
    assert "leaks           4         1  FAILED" in ran.stdout
    assert "1 of 2 trials failed" in ran.stdout


def claims(**failures: int) -> list[Claim]:
    return [
        Claim(id, f"About {id}.", 10, failed, date="2026-01-01", machine="2 cores, 8 GiB")
        for id, failed in failures.items()
    ]


def test_the_page_shows_what_failed_and_what_was_never_tried() -> None:
    page = assurance.page([*claims(good=0, bad=2), Claim("new", "About new.")])
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert "| held |" in rows["good"]
    assert "| 10 | 2 | **FAILED** | 2026-01-01, 2 cores, 8 GiB |" in rows["bad"]
    assert "| 0 | 0 | not run |" in rows["new"]


def test_a_run_of_a_part_renews_that_part(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: assurance.Declared(f"{name}!", "attack", ()) for name in ("a", "b", "c")}
    monkeypatch.setattr(assurance, "declared", lambda: known)
    kept = assurance.kept(claims(a=1, b=1, gone=0), claims(b=0))
    assert [(claim.id, claim.status, claim.statement) for claim in kept] == [
        ("a", "**FAILED**", "a!"),
        ("b", "held", "b!"),
        ("c", "not run", "c!"),
    ]


def test_what_tries_a_claim_is_the_whole_command() -> None:
    declared = assurance.declared()
    assert declared["chaos.lost"].command == "make chaos"
    assert declared["soak.memory"].command == "make chaos SOAK=1"


def test_a_claim_is_stated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assurance, "ROOT", tmp_path)
    test = tmp_path / "tests" / "test_it.py"
    test.parent.mkdir()
    test.write_text('@pytest.mark.claim("a", "It is.")\n@pytest.mark.claim("a")\ndef test(): ...')
    assert assurance.declared()["a"].statement == "It is."
    test.write_text(test.read_text().replace('"a")', '"a", "It is not.")'))
    with pytest.raises(ValueError, match="two statements"):
        assurance.declared()
    test.write_text('@pytest.mark.claim("b")\ndef test(): ...')
    with pytest.raises(ValueError, match="no test states"):
        assurance.declared()
