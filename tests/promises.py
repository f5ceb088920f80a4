"""Promises that are tried on the project, and on copies weakened in one place, where they break.

A promise is a function `check_…` of a module of tests, which fails where it is not kept. What makes
a weakened copy is a sequence of owner, attribute and replacement, as often as needed.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

Check = Callable[..., None]


def checks_of(module: Mapping[str, Any]) -> dict[str, Check]:
    """Return the checks among a module's names, without the prefix they have in common."""
    return {
        name.removeprefix("check_"): check
        for name, check in module.items()
        if name.startswith("check_")
    }


def run(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a check, with `monkeypatch` where it takes it."""
    check(monkeypatch) if inspect.signature(check).parameters else check()


def weaken(patches: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a weakened copy; an attribute may be one that only instances have."""
    for owner, attribute, replacement in zip(*[iter(patches)] * 3, strict=True):
        monkeypatch.setattr(owner, attribute, replacement, raising=False)
