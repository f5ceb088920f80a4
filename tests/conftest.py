"""What holds for every test."""

import logging
import signal

import pytest

pytest_plugins = ["tests.claims"]

# Many tests interrupt what they start. Where interrupts are ignored, as a shell has it in the
# background, everything that is started would ignore them too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where two processes share the tests, one has all the engines: two at once would be slower."""
    for item in items:
        engine = item.get_closest_marker("engine")
        item.add_marker(pytest.mark.xdist_group("engine" if engine else item.path.stem))


@pytest.fixture(autouse=True)
def usual_root_logger() -> None:
    """Undo what a dependency of vLLM does when a test imports it: it silences the root logger."""
    logging.getLogger().setLevel(logging.WARNING)
