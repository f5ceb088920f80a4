"""`python utils.py COMMAND` as people run it, against a Hub on loopback."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import utils
from tests.hub import Hub
from tests.test_utils import MODEL, NEEDED, TOKEN, files_of

ROOT = Path(utils.__file__).parent


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub with `org/tiny` for everybody and `org/gated` for one account."""
    with Hub().serving() as hub:
        hub.add("org/tiny", MODEL)
        hub.add("org/gated", MODEL, gated=True)
        hub.tokens.add(TOKEN)
        hub.granted.add(TOKEN)
        yield hub


class Volume:
    """A volume and the environment of a pod that it is attached to."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.home = folder / "volume"
        self.cache = self.home / "hub"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": hub.url,
        }

    def run(self, *words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-W", "error", "utils.py", *words],
            cwd=ROOT,
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def volume(tmp_path: Path, hub: Hub) -> Volume:
    """An empty volume."""
    hub.forget()
    hub.faults.clear()
    return Volume(tmp_path, hub)


def test_fetch_prepares_a_volume(volume: Volume, hub: Hub) -> None:
    fetched = volume.run("fetch", "org/tiny")
    assert fetched.returncode == 0, fetched.stderr
    (path,) = fetched.stdout.splitlines()
    assert Path(path).is_relative_to(volume.cache)
    assert files_of(Path(path)) == NEEDED
    assert "downloaded" in fetched.stderr
    # What MODELS names, with the token of the environment; what is there is not fetched again.
    hub.forget()
    more = volume.run("fetch", MODELS="org/tiny,org/gated", HF_TOKEN=TOKEN)
    assert more.returncode == 0, more.stderr
    assert len(more.stdout.splitlines()) == 2
    assert TOKEN not in more.stdout + more.stderr
    assert hub.count("* */org/tiny/*") == 0


@pytest.mark.parametrize(
    ("words", "environ", "code", "says"),
    [
        (("fetch",), {}, 3, "name a model, such as org/name, or set MODELS"),
        (("fetch", "org/tiny"), {"HF_HUB_OFFLINE": "perhaps"}, 3, "HF_HUB_OFFLINE is neither"),
        (("fetch", "org/gated"), {}, 1, "accept its licence"),
        (("fetch", "org/nothing"), {}, 1, "no model org/nothing"),
        (("feched",), {}, 2, "invalid choice"),
        ((), {}, 2, "required: COMMAND"),
    ],
)
def test_what_goes_wrong_is_said_and_coded(
    volume: Volume, words: tuple[str, ...], environ: dict[str, str], code: int, says: str
) -> None:
    ran = volume.run(*words, **environ)
    assert ran.returncode == code, ran.stderr
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_help_names_the_volume(volume: Volume) -> None:
    printed = volume.run("--help").stdout
    assert str(volume.cache) in printed
    assert "exit codes" in printed
