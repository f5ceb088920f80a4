"""Waiting for a condition in tests, with a deadline instead of a guessed sleep."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(predicate: Callable[[], T], timeout_s: float = 10.0, what: str = "") -> T:
    """Return the predicate's first true value; fail the test when none comes in `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s} s: {what or predicate}")
        time.sleep(0.01)
    return value
