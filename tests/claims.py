"""Counts the trials of claims: a plugin of pytest, in force for all tests.

    @pytest.mark.claim("replay", "A request is answered once.")
    def test_replay(claim: Trials) -> None:
        for n in range(claim.count(short=20, full=10_000)):
            claim.trial(refused(n))
        claim.detail("in 3 ms each")

A marked test that counts nothing is one trial. Trials that failed fail the test. Further tests of
the same claim name its id alone. Results go to the file of `--claims`, and are printed at the end;
tools/assurance.py keeps them. `ASSURANCE=full` tries as often as `make attack`.
"""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tools import assurance
from tools.assurance import Claim

FULL = os.environ.get("ASSURANCE") == "full"

_TRIALS = pytest.StashKey["Trials"]()


class Trials:
    """What one test counts for its claim."""

    full = FULL
    """Whether to try as often as `make attack` does."""

    def __init__(self) -> None:
        self.tried = 0
        self.failures = 0
        self.details: list[str] = []

    def trial(self, ok: bool) -> None:
        """Count one trial."""
        self.trials(1, 0 if ok else 1)

    def trials(self, tried: int, failures: int = 0) -> None:
        """Count several trials at once."""
        self.tried += tried
        self.failures += failures

    def detail(self, text: str) -> None:
        """Add a figure to the claim's line."""
        self.details.append(text)

    def count(self, short: int, full: int) -> int:
        """Return how often to try: `full` under `make attack` or `make chaos`, else `short`."""
        return full if FULL else short


@pytest.fixture
def claim(request: pytest.FixtureRequest) -> Trials:
    """The trials of the claim that the test is marked with."""
    assert request.node.get_closest_marker("claim"), "the test is not marked with a claim"
    return _trials(request.node)


def _trials(item: pytest.Item) -> Trials:
    if _TRIALS not in item.stash:
        item.stash[_TRIALS] = Trials()
    return item.stash[_TRIALS]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--claims", help="write the claims that were tried to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "claim(id, statement): what the test shows to hold")
    config.pluginmanager.register(_Collector(config), "claims-collector")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    result = yield
    trials = _trials(item)
    if trials.failures:
        pytest.fail(f"{trials.failures} of {trials.tried} trials failed: {trials.details}")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    marker = item.get_closest_marker("claim")
    if marker and (call.when == "call" or report.failed) and not report.skipped:
        trials = _trials(item)
        failures = trials.failures or int(report.failed)
        # Of all that a report has, this travels between processes that share the tests.
        report.user_properties.append(
            (
                "claim",
                {
                    "id": marker.args[0],
                    "statement": marker.args[1] if len(marker.args) > 1 else "",
                    "trials": max(trials.tried, 1),
                    "failures": failures,
                    "detail": "; ".join(trials.details),
                    "suite": assurance.suite_of(item.path),
                    "full": FULL,
                },
            )
        )
    return report


class _Collector:
    """Gathers the claims of all processes where the reports come together."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._found: list[Claim] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == "claim" and isinstance(value, dict):
                self._found.append(Claim(**value))

    def pytest_sessionfinish(self) -> None:
        path = self._config.getoption("--claims")
        if path and not hasattr(self._config, "workerinput"):
            assurance.write(Path(path), assurance.merged(self._found))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if claims := assurance.merged(self._found):
            terminalreporter.section("claims")
            terminalreporter.write_line(assurance.summary(claims))
