"""The audit of what is installed: what is known is found, and what is not known is said."""

import json
from pathlib import Path

import pytest

from tools import audit

ADVISORY = """
id: PYSEC-0000-1
affected:
- package: {name: thing, ecosystem: PyPI}
  ranges:
  - type: GIT
    events: [{introduced: "0"}]
  - type: ECOSYSTEM
    events: [{introduced: "1.0"}, {fixed: "1.4"}, {introduced: "2.0"}, {fixed: "2.0.1"}]
  versions: ["0.1b"]
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    folder = tmp_path / "vulns" / "thing"
    folder.mkdir(parents=True)
    (folder / "PYSEC-0000-1.yaml").write_text(ADVISORY)
    withdrawn = ADVISORY.replace("-1", "-2") + 'withdrawn: "2020-01-01T00:00:00Z"\n'
    (folder / "PYSEC-0000-2.yaml").write_text(withdrawn)
    return tmp_path


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("0.9", False),
        ("0.1b", True),
        ("1.0", True),
        ("1.3.9", True),
        ("1.3+cpu", True),
        ("1.4", False),
        ("1.9", False),
        ("2.0", True),
        ("2.0.1", False),
    ],
)
def test_versions_within_an_advisory_are_found(database: Path, version: str, known: bool) -> None:
    found = [str(each) for each in audit.findings(database, {"thing": version, "other": "1.0"})]
    expected = [f"thing {version}: PYSEC-0000-1, fixed in 1.4, 2.0.1"]
    assert found == (expected if known else [])


def test_its_end_tells_whether_something_is_known(
    database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--database", str(database)]
    assert audit.main(args) == 0
    monkeypatch.setattr(audit, "installed", lambda: {"thing": "1.0"})
    assert audit.main(args) == 1
    assert "1 packages, 1 known vulnerabilities" in capsys.readouterr().out
    assert audit.main(["--database", str(database / "vulns")]) == 2
    assert "Nothing is known" in capsys.readouterr().err


def test_without_an_answer_about_every_package_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "bin" / "pip-audit"
    program.parent.mkdir()
    monkeypatch.setattr(audit, "ENVIRONMENT", tmp_path)
    sound = {"name": "other", "version": "2", "vulns": []}
    known = {"id": "PYSEC-0000-1", "fix_versions": ["1.4"]}
    skipped = {"name": "thing", "skip_reason": "Dependency not found on PyPI"}
    for answers, code in (
        ([sound, {"name": "thing", "version": "1.0", "vulns": []}], 0),
        ([sound, {"name": "thing", "version": "1.0", "vulns": [known]}], 1),
        ([sound, skipped], 2),
        (None, 2),
    ):
        (tmp_path / "told").write_text(json.dumps({"dependencies": answers}) if answers else "")
        program.write_text(f"#!/bin/sh\ncat {tmp_path}/told\n")
        program.chmod(0o755)
        assert audit.ask_the_network({"thing": "1.0+cpu", "other": "2"}) == code
        assert ("Nothing is known" in capsys.readouterr().err) == (code == 2)
    assert (tmp_path / "installed.txt").read_text() == "other==2\nthing==1.0\n"
