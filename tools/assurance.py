"""Runs a suite of claims, prints what held and what did not, and keeps docs/assurance.md.

    tools/assurance.py attack|chaos|image-test [pytest's arguments]

A claim is a test (or several) marked `@pytest.mark.claim("id", "statement")`; tests/claims.py
counts its trials. What is kept of a run is docs/assurance.jsonl, a line per claim, and the page
made from it. A run of part of a suite renews the lines of that part. The exit code is 0 only
when every test passed.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs" / "assurance.jsonl"
PAGE = ROOT / "docs" / "assurance.md"

SOAK = "tests/chaos/test_soak.py"
"""What `make chaos` leaves out unless it is asked for: it takes 20 minutes by itself."""

SUITES = {
    "attack": "What a hostile platform, sender or reader tries.",
    "chaos": "What a platform and machines that fail may do to an answer.",
    "image-test": "What the image holds, and how the worker runs in it.",
}


@dataclass(frozen=True)
class Claim:
    """What one promise was found to be worth: `failures` of `trials`."""

    id: str
    statement: str
    trials: int = 0
    failures: int = 0
    detail: str = ""
    suite: str = "attack"
    date: str = ""
    machine: str = ""
    commit: str = ""
    """The code that was tried, with a + where it had changed since."""
    full: bool = True
    """Whether it was tried as often as the suite does; `make test` tries less."""

    @property
    def status(self) -> str:
        """The word for it."""
        if self.failures:
            return "**FAILED**"
        return "held" if self.trials else "not run"


@dataclass(frozen=True)
class Declared:
    """A claim as the tests name it."""

    statement: str
    suite: str
    files: tuple[str, ...]

    @property
    def command(self) -> str:
        """What tries it."""
        return f"make {self.suite}" + (" SOAK=1" if self.files == (SOAK,) else "")


def declared() -> dict[str, Declared]:
    """Return the claims that the tests declare, in their order; ValueError for one told twice."""
    found: dict[str, Declared] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for id, statement in _marks(path):
            file, suite = path.relative_to(ROOT).as_posix(), suite_of(path)
            known = found.setdefault(id, Declared("", suite, ()))
            if statement and known.statement not in ("", statement):
                raise ValueError(f"claim {id} has two statements")
            if known.suite != suite:
                raise ValueError(f"claim {id} is in two suites")
            found[id] = Declared(
                statement or known.statement, suite, tuple(dict.fromkeys((*known.files, file)))
            )
    if lacking := [id for id, claim in found.items() if not claim.statement]:
        raise ValueError(f"no test states the claims {lacking}")
    return found


def suite_of(path: Path) -> str:
    """Return the suite that a test's file belongs to."""
    return {"chaos": "chaos", "image": "image-test"}.get(path.parent.name, "attack")


def _marks(path: Path) -> Iterator[tuple[str, str]]:
    text = path.read_text()
    if "mark.claim(" not in text:
        return
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "claim"
        ):
            words = [ast.literal_eval(word) for word in node.args]
            yield words[0], words[1] if len(words) > 1 else ""


# --- what is kept ---------------------------------------------------------------------------


def read(path: Path) -> list[Claim]:
    """Return the claims of a file of JSON lines."""
    if not path.exists():
        return []
    return [Claim(**json.loads(line)) for line in path.read_text().splitlines()]


def write(path: Path, claims: Iterable[Claim]) -> None:
    """Write claims as JSON lines."""
    path.write_text("".join(json.dumps(asdict(claim)) + "\n" for claim in claims))


def merged(claims: Iterable[Claim]) -> list[Claim]:
    """Return one claim for each id, with the trials and details of all its tests."""
    found: dict[str, Claim] = {}
    for claim in claims:
        before = found.get(claim.id)
        if before is None:
            found[claim.id] = claim
            continue
        details = dict.fromkeys(text for text in (before.detail, claim.detail) if text)
        found[claim.id] = replace(
            before,
            statement=before.statement or claim.statement,
            trials=before.trials + claim.trials,
            failures=before.failures + claim.failures,
            detail="; ".join(details),
        )
    return list(found.values())


def kept(old: Iterable[Claim], new: Iterable[Claim]) -> list[Claim]:
    """Return the claims that the tests declare, as last tried; those never tried have no trials."""
    known = {claim.id: claim for claim in [*old, *new]}
    return [
        replace(
            known.get(id, Claim(id, claim.statement)), statement=claim.statement, suite=claim.suite
        )
        for id, claim in declared().items()
    ]


def page(claims: Sequence[Claim]) -> str:
    """Return docs/assurance.md."""
    lines = [
        "# What was tried, and what held",
        "",
        "Written by `make attack`, `make chaos` and `make image-test` from `docs/assurance.jsonl`,",
        "not by hand. A claim that failed when it was last tried is shown as failed; one that was",
        "never tried says so. What the claims are about is in [SECURITY.md](../SECURITY.md).",
    ]
    for suite, about in SUITES.items():
        rows = [claim for claim in claims if claim.suite == suite]
        if rows:
            lines += ["", f"## `make {suite}`", "", about, "", *_rows(rows)]
    return "\n".join(lines) + "\n"


def _rows(claims: Iterable[Claim]) -> list[str]:
    lines = ["| claim | trials | failures | status | tried | figures |", "|" + " --- |" * 6]
    for claim in claims:
        tried = (claim.date, claim.machine, f"`{claim.commit}`" if claim.commit else "")
        where = ", ".join(filter(None, tried)) if claim.trials else ""
        cells = (
            f"`{claim.id}`: {claim.statement}",
            f"{claim.trials:,}",
            f"{claim.failures:,}",
            claim.status,
            where if claim.full else f"{where}, in short",
            claim.detail,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def summary(claims: Sequence[Claim]) -> str:
    """Return the table as a run prints it."""
    wide = max((len(claim.id) for claim in claims), default=5)
    lines = [f"{'claim':{wide}}  {'trials':>9}  {'failures':>8}  status"]
    for claim in claims:
        status = claim.status.strip("*")
        lines.append(f"{claim.id:{wide}}  {claim.trials:>9,}  {claim.failures:>8,}  {status}")
        if claim.detail:
            lines.append(f"{'':{wide}}  {claim.detail}")
    return "\n".join(lines)


def machine() -> str:
    """Return the size of this machine in words."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{os.cpu_count()} cores, {pages / 2**30:.0f} GiB"


def commit() -> str:
    """Return which code this is, empty where git does not know."""

    def git(*words: str) -> str:
        ran = subprocess.run(
            ["git", *words],  # noqa: S607 - the person's own git
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        return ran.stdout.strip() if ran.returncode == 0 else ""

    changed = git("status", "--porcelain", "--", ".", ":!docs", ":!*.md")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def today() -> str:
    """Return the date, as it is in Greenwich."""
    return datetime.now(UTC).date().isoformat()


# --- running --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run a suite in full and keep its results; return the exit code."""
    parser = argparse.ArgumentParser(prog="assurance.py", description="Run a suite of claims.")
    parser.add_argument("suite", choices=SUITES)
    args, more = parser.parse_known_args(argv)
    files = {
        file for claim in declared().values() if claim.suite == args.suite for file in claim.files
    }
    tried = commit()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "claims.jsonl"
        code = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-m", "claim"),
                *("--claims", str(results), "--show-capture=stdout"),
                *more,
                *sorted(files),
            ],
            cwd=ROOT,
            env={**os.environ, "ASSURANCE": "full"},
            check=False,
        ).returncode
        new = [
            replace(claim, date=today(), machine=machine(), commit=tried)
            for claim in merged(read(results))
        ]
    write(KEPT, kept(read(KEPT), new))
    PAGE.write_text(page(read(KEPT)))
    subprocess.run([sys.executable, "tools/make_docs.py"], cwd=ROOT, check=True)
    failed = [claim.id for claim in new if claim.failures]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return code or bool(failed)


if __name__ == "__main__":
    sys.exit(main())
