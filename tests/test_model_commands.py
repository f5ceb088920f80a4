"""`python utils.py COMMAND` as people run it, against a Hub on loopback."""

import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import utils
from model_files import human_size
from model_lease import Claim, Pace
from tests.hub import Hub
from tests.test_utils import MODEL, NEEDED, SHARD_1, SHARD_2, TOKEN, files_of, write_model
from tests.wait import until

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
    assert f"models go to {volume.cache}; set HF_HOME" in fetched.stderr
    assert "are here" not in fetched.stderr, "it is the first download"
    # What MODELS names, with the token of the environment; what is there is not fetched again.
    hub.forget()
    more = volume.run("fetch", MODELS="org/tiny,org/gated", HF_TOKEN=TOKEN)
    assert more.returncode == 0, more.stderr
    assert len(more.stdout.splitlines()) == 2
    assert TOKEN not in more.stdout + more.stderr
    assert hub.count("* */org/tiny/*") == 0


def test_model_path_holds_the_first_of_models_as_it_does_for_a_worker(
    volume: Volume, hub: Hub, tmp_path: Path
) -> None:
    copied = write_model(tmp_path / "copied")
    fetched = volume.run("fetch", MODEL_PATH=str(copied), MODELS="org/tiny")
    assert fetched.stdout.splitlines() == [str(copied)]
    assert hub.requests == []
    missing = volume.run("verify", "org/tiny", MODEL_PATH=str(tmp_path / "none"))
    assert missing.returncode == 1
    assert f"MODEL_PATH {tmp_path / 'none'} does not exist" in missing.stderr


def flip(path: Path, at: int) -> None:
    """Invert one byte of a file, wherever it really lies."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))


@pytest.mark.parametrize("linked", [True, False], ids=["links", "no-links"])
def test_a_flipped_byte_is_found_and_repaired(volume: Volume, hub: Hub, linked: bool) -> None:
    path = Path(volume.run("fetch", "org/tiny").stdout.strip())
    if linked:
        shutil.rmtree(volume.cache / "models--org--tiny" / "trees")
    else:  # as on a file system without links
        for file in NEEDED:
            (path / file).resolve().rename(path / file)
    flip(path / SHARD_2, 250_000)
    flip(path / "chat_template.jinja", 0)
    assert volume.run("verify", "org/tiny").returncode == 0, "sizes are right"
    found = volume.run("verify", "org/tiny", "--sha256")
    assert found.returncode == 4
    good = hashlib.sha256(MODEL[SHARD_2]).hexdigest()
    assert f"damaged: {SHARD_2}: its SHA-256 is " in found.stdout
    assert f", not {good}" in found.stdout
    assert "damaged: chat_template.jinja: its git hash is " in found.stdout
    assert f"2 damaged; {len(NEEDED)} files checked, {len(NEEDED)} of them by" in found.stdout
    hub.forget()
    repaired = volume.run("verify", "org/tiny", "--sha256", "--repair")
    assert repaired.returncode == 0, repaired.stderr
    assert "org/tiny: whole" in repaired.stdout
    assert (repaired.stdout + repaired.stderr).count(good) == 1
    assert hub.count("GET /cdn/*") == 1
    assert hub.count(f"GET /cdn/*{SHARD_2}") == 1
    assert {file: (path / file).read_bytes() for file in NEEDED} == {
        file: MODEL[file] for file in NEEDED
    }


def test_damage_in_transit_is_found_by_the_hash(volume: Volume, hub: Hub) -> None:
    """The Hub library takes a flipped byte for good, as `fetch` does: hence `--sha256`."""
    hub.fault("flip", path=f"/cdn/*{SHARD_1}", after_bytes=100_000)
    assert volume.run("fetch", "org/tiny").returncode == 0
    assert volume.run("verify", "org/tiny", "--sha256").returncode == 4
    assert volume.run("verify", "org/tiny", "--sha256", "--repair").returncode == 0


def test_damage_that_sizes_show_is_repaired_without_hashing(volume: Volume, hub: Hub) -> None:
    path = Path(volume.run("fetch", "org/tiny").stdout.strip())
    os.truncate(path / SHARD_1, 1000)
    found = volume.run("verify", "org/tiny")
    assert found.returncode == 4
    assert f"damaged: {SHARD_1}: 1000 of {len(MODEL[SHARD_1])} bytes" in found.stdout
    refused = volume.run("verify", "org/tiny", "--repair", HF_HUB_OFFLINE="1")
    assert (refused.returncode, "unset it" in refused.stderr) == (1, True)
    assert volume.run("verify", "org/tiny", "--repair").returncode == 0


def test_a_folder_is_verified_but_never_repaired(volume: Volume, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "models" / "org" / "tiny")
    whole = volume.run("verify", "org/tiny", "--sha256", MODEL_DIRS=str(tmp_path / "models"))
    assert whole.returncode == 0
    assert "files checked, none by its hash: only models that were fetched" in whole.stdout
    (folder / SHARD_1).unlink()
    refused = volume.run("verify", str(folder), "--repair")
    assert refused.returncode == 1
    assert "copy the damaged files again" in refused.stderr


def test_the_janitor_removes_what_the_dead_left_and_nothing_else(volume: Volume, hub: Hub) -> None:
    path = Path(volume.run("fetch", "org/tiny").stdout.strip())
    assert "nothing to remove" in volume.run("janitor").stdout
    blobs, locks = path.parent.parent / "blobs", volume.cache / ".locks" / "models--org--tiny"
    (blobs / "young.incomplete").write_bytes(b"x" * 1000)
    (locks / "young.lock").touch()
    old = [blobs / "old.incomplete", locks / "old.lock", locks / "lease.3"]
    for file in old:
        file.write_bytes(b"x" * 5000)
        os.utime(file, (time.time() - 7200,) * 2)
    looked = volume.run("janitor").stdout
    assert "org/tiny: unfinished download, 5.00 kB" in looked
    assert "left alone: 1 unfinished downloads, written to within the last hour" in looked
    assert "org/tiny: lease" in looked
    assert "nothing was removed; --remove frees 5.00 kB" in looked
    assert all(file.exists() for file in old)
    assert "removed, 5.00 kB freed" in volume.run("janitor", "--remove").stdout
    assert not any(file.exists() for file in old)
    assert (blobs / "young.incomplete").exists()
    assert (locks / "young.lock").exists()
    assert volume.run("verify", "org/tiny", "--sha256").returncode == 0


def test_the_janitor_removes_unused_snapshots_when_asked(volume: Volume, hub: Hub) -> None:
    shards = {SHARD_1: MODEL[SHARD_1], SHARD_2: MODEL[SHARD_2][:-10] + b"0123456789"}
    old = hub.add("org/moving", {**MODEL, **shards})
    volume.run("fetch", f"org/moving@{old}")
    new = hub.add("org/moving", MODEL)
    volume.run("fetch", "org/moving")
    assert "nothing to remove" in volume.run("janitor").stdout
    looked = volume.run("janitor", "--unused").stdout
    # Of the two shards, one belongs to both revisions.
    freed = human_size(len(MODEL[SHARD_2]))
    assert f"org/moving: snapshot {old[:7]} that no branch stands for, {freed}" in looked
    named = volume.run("janitor", "--unused", "--remove", MODELS=f"org/moving@{old}")
    assert "nothing to remove" in named.stdout, "it is in use by its commit"
    # However the way to the cache is written.
    roundabout = f"{volume.home}/../{volume.home.name}"
    assert looked == volume.run("janitor", "--unused", HF_HOME=roundabout).stdout
    assert f"{freed} freed" in volume.run("janitor", "--unused", "--remove").stdout
    snapshots = volume.cache / "models--org--moving" / "snapshots"
    assert [path.name for path in snapshots.iterdir()] == [new]
    assert volume.run("verify", "org/moving", "--sha256").returncode == 0


def test_leases_are_shown_and_released(volume: Volume, hub: Hub) -> None:
    folder = volume.cache / ".locks" / "models--org--tiny"
    folder.mkdir(parents=True)
    assert volume.run("lease").stdout == f"nobody downloads into {volume.cache}\n"
    lease = Claim(folder, "w1", Pace(0.1, 60), logging.getLogger()).take()
    assert lease is not None
    with lease:
        shown = volume.run("lease").stdout
        assert shown.startswith(f"org/tiny: worker w1 on {socket.gethostname()} (pid {os.getpid()}")
        assert "seen 0 s ago\n" in shown
        assert volume.run("lease", "--release").returncode == 2
        taken = volume.run("lease", "--release", "org/tiny")
        assert taken.stdout.startswith("org/tiny: taken from worker w1")
        until(lambda: lease.lost)
    assert volume.run("lease", "org/tiny").stdout == "org/tiny: nobody holds it\n"
    (folder / "lease.1").touch()
    os.utime(folder / "lease.1", (time.time() - 81,) * 2)
    assert "s ago; it is dead, whoever wants the model next" in volume.run("lease").stdout


def test_an_interrupted_fetch_gives_its_lease_back(volume: Volume, hub: Hub) -> None:
    hub.fault("stall", path=f"/cdn/*{SHARD_2}", after_bytes=280_000)
    command = [sys.executable, "utils.py", "fetch", "org/tiny"]
    with subprocess.Popen(
        command, cwd=ROOT, env=volume.environ, stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: hub.body_bytes > 400_000)
        assert "pid" in volume.run("lease", "org/tiny").stdout
        process.terminate()
        assert process.wait(10) == 143
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert "nobody holds it" in volume.run("lease", "org/tiny").stdout
    assert list(volume.cache.rglob("*.incomplete")) == []


@pytest.mark.parametrize(
    ("words", "environ", "code", "says"),
    [
        (("fetch",), {}, 2, "name a model, such as org/name, or set MODELS"),
        (
            ("fetch", "org/tiny"),
            {"HF_HUB_OFFLINE": "perhaps"},
            3,
            "the settings cannot work:\n- HF_HUB_OFFLINE is neither",
        ),
        (("fetch", "org/tiny"), {"HF_HOME": "/proc/nope"}, 1, "cannot write to /proc/nope/hub"),
        (("fetch", "org/tiny"), {"HF_HOME": "/sys/fs"}, 1, "cannot write to /sys/fs/hub"),
        (("janitor",), {"HF_HOME": "/nonexistent"}, 3, "HF_HOME is /nonexistent, where there is"),
        (("report",), {"HF_HOME": "/nonexistent"}, 3, "HF_HOME is /nonexistent, where there is"),
        (("report", "--last", "0"), {}, 2, "'0' is not a number from 1"),
        (("fetch", "org/gated"), {}, 1, "accept its licence"),
        (("fetch", "org/nothing"), {}, 1, "no model org/nothing"),
        (("verify", "org/tiny"), {}, 1, "/hub; fetch it first"),
        (("verify", "nope"), {}, 1, "models of the Hub are written org/name"),
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


def test_what_is_wrong_with_one_model_hides_nothing_of_the_others(volume: Volume, hub: Hub) -> None:
    fetched = volume.run("fetch", "org/nothing,org/tiny", "org/nought")
    assert fetched.returncode == 1
    (path,) = fetched.stdout.splitlines()
    assert "no model org/nothing" in fetched.stderr
    assert "no model org/nought" in fetched.stderr
    assert volume.run("verify", "org/nothing", "org/tiny").returncode == 1
    os.truncate(Path(path) / SHARD_1, 1000)
    verified = volume.run("verify", "org/tiny", "org/nothing")
    assert verified.returncode == 4, "damage is the worse of the two"
    assert "org/tiny: 1 damaged" in verified.stdout
    assert "nothing of org/nothing in " in verified.stderr


def test_the_revisions_that_are_here_are_named(volume: Volume, hub: Hub) -> None:
    sha = hub.add("org/pinned", MODEL)
    assert volume.run("fetch", f"org/pinned@{sha}").returncode == 0
    absent = volume.run("verify", "org/pinned")
    assert absent.returncode == 1
    assert f"revision main of org/pinned is not here, but org/pinned@{sha}: name" in absent.stderr
    refs = volume.cache / "models--org--pinned" / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "dev").write_text(sha)
    assert "not here, but org/pinned@dev: name" in volume.run("verify", "org/pinned").stderr


def test_little_is_needed_on_a_pod() -> None:
    """As the README says; what is imported when a command runs counts for that command."""
    code = (
        "import sys, utils, model_commands\n"
        "files = {n: getattr(m, '__file__', None) or '' for n, m in sys.modules.items()}\n"
        "print(*{n.partition('.')[0] for n, f in files.items() if 'site-packages' in f})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert {name for name in ran.stdout.split() if not name.startswith("_")} == {"psutil"}


def test_the_help_names_the_volume(volume: Volume) -> None:
    printed = volume.run("--help").stdout
    assert str(volume.cache) in printed
    assert "exit codes" in printed
