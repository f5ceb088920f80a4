"""Models from every place they may be in, on the real huggingface_hub against a Hub on loopback."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import model_cache
import utils
from errors import DiskFull, ModelError, ModelGated, ModelIncomplete, ModelNotFound, ModelOffline
from model_files import check, human_size, select_files
from model_lease import Pace
from model_progress import Manifest, Progress
from tests.hub import Hub
from utils import Patience, Snapshot

ROOT = Path(utils.__file__).parent
TOKEN = "hf_secretTokenOfTheTest"
SHARD_1 = "model-00001-of-00002.safetensors"
SHARD_2 = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
PACE = Pace(heartbeat_s=0.2, stale_s=2.0)
ONCE = Patience(attempts=1, backoff_s=0.05, log_every_s=0.2, pace=PACE)
THRICE = Patience(attempts=3, backoff_s=0.05, log_every_s=0.2, pace=PACE)


def safetensors(data_bytes: int) -> bytes:
    """Return a safetensors file whose one tensor has this many bytes."""
    entry = {"dtype": "U8", "shape": [data_bytes], "data_offsets": [0, data_bytes]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(data_bytes)


MODEL: dict[str, bytes] = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"vocab": "' + b"a" * 9000 + b'"}',
    "chat_template.jinja": b"{{ messages }}",
    SHARD_1: safetensors(200_000),
    SHARD_2: safetensors(300_000),
    INDEX: json.dumps({"weight_map": {"a": SHARD_1, "b": SHARD_2}}).encode(),
    # What no engine needs:
    "pytorch_model.bin": b"x" * 9000,
    "consolidated.safetensors": safetensors(10_000),
    "original/params.json": b"{}",
    "onnx/model.onnx": b"x" * 9000,
    "README.md": b"# A model",
    ".gitattributes": b"*.bin lfs",
}
UNNEEDED = (
    "pytorch_model.bin",
    "consolidated.safetensors",
    "original/params.json",
    "onnx/model.onnx",
    "README.md",
    ".gitattributes",
)
NEEDED = sorted(set(MODEL) - set(UNNEEDED))
NEEDED_BYTES = sum(len(MODEL[file]) for file in NEEDED)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub with the model `org/tiny`."""
    with Hub().serving() as hub:
        hub.add("org/tiny", MODEL)
        hub.tokens.add(TOKEN)
        yield hub


@pytest.fixture(autouse=True)
def quiet_hub(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """Begin every test with nothing recorded and no faults."""
    # A dependency of vLLM raises the root logger's level when another test imports it.
    caplog.set_level(logging.INFO, "utils")
    hub.faults.clear()
    hub.forget()


@pytest.fixture(scope="module")
def downloaded(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache into which `org/tiny` was downloaded; tests copy it."""
    cache = tmp_path_factory.mktemp("downloaded") / "hub"
    utils.resolve("org/tiny", hub_cache=cache, endpoint=hub.url, patience=ONCE)
    return cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache."""
    return tmp_path / "hub"


@pytest.fixture
def full_cache(downloaded: Path, cache: Path) -> Path:
    """A cache of this test's own that holds `org/tiny`."""
    shutil.copytree(downloaded, cache, symlinks=True)
    return cache


@pytest.fixture
def resolve(hub: Hub, cache: Path, tmp_path: Path) -> Callable[..., Snapshot]:
    """`utils.resolve` against the test's Hub and caches."""

    def call(model: str = "org/tiny", **more: Any) -> Snapshot:
        settings: dict[str, Any] = {
            "hub_cache": cache,
            "runpod_cache": tmp_path / "runpod",
            "endpoint": hub.url,
            "patience": ONCE,
        }
        return utils.resolve(model, **(settings | more))

    return call


def files_of(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def snapshot_folder(cache: Path, name: str = "org/tiny") -> Path:
    (folder,) = (cache / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()
    return folder


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def write_model(folder: Path, files: Mapping[str, bytes] = MODEL) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# ---------------------------------------------------------------- the order


def test_empty_cache_downloads_only_what_the_engine_needs(
    hub: Hub, resolve: Callable[..., Snapshot], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "utils")
    snapshot = resolve()
    assert snapshot.source == "hub"
    assert snapshot.name == "org/tiny"
    assert snapshot.revision == hub.repositories["org/tiny"].branches["main"]
    assert snapshot.path == snapshot_folder(cache)
    assert files_of(snapshot.path) == NEEDED
    assert snapshot.bytes == NEEDED_BYTES
    assert {file: (snapshot.path / file).read_bytes() for file in NEEDED} == {
        file: MODEL[file] for file in NEEDED
    }
    assert hub.count("GET /api/models/*/revision/*") == 1
    assert hub.count("GET /api/models/*/tree/*") == 1
    assert hub.count("*agent*") == 0, "telemetry is off"
    assert hub.count() == 2 + 2 * len(NEEDED)
    assert f"downloading 7 files, {human_size(NEEDED_BYTES)}" in caplog.text
    assert "downloaded" in caplog.text


def test_complete_cache_needs_no_network(
    hub: Hub, resolve: Callable[..., Snapshot], full_cache: Path
) -> None:
    snapshot = resolve()
    assert (snapshot.source, snapshot.bytes) == ("cache", NEEDED_BYTES)
    sha = snapshot.revision
    assert resolve(f"org/tiny@{sha}").path == snapshot.path
    assert resolve("https://huggingface.co/org/tiny").path == snapshot.path
    assert resolve(offline=True).path == snapshot.path
    assert hub.requests == []


def test_cache_without_the_hubs_listing_is_judged_by_itself(
    hub: Hub, resolve: Callable[..., Snapshot], full_cache: Path
) -> None:
    shutil.rmtree(full_cache / "models--org--tiny" / "trees")
    assert resolve().source == "cache"
    (snapshot_folder(full_cache) / "tokenizer.json").unlink()
    with pytest.raises(ModelIncomplete, match="tokenizer: missing"):
        resolve(offline=True)
    assert hub.requests == []


def test_each_place_goes_before_the_next(
    hub: Hub,
    resolve: Callable[..., Snapshot],
    full_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    full_cache.rename(tmp_path / "runpod")
    from_runpod = resolve()
    assert from_runpod.source == "runpod cache"
    assert from_runpod.path.is_relative_to(tmp_path / "runpod")

    shutil.copytree(tmp_path / "runpod", full_cache, symlinks=True)
    assert resolve().source == "cache"

    write_model(tmp_path / "org" / "tiny")
    folder = resolve()
    assert (folder.source, folder.name, folder.revision) == ("folder", "tiny", None)

    write_model(tmp_path / "baked")
    named = resolve(model_path=tmp_path / "baked", model="org/other@v2")
    assert (named.source, named.name) == ("MODEL_PATH", "org/other")
    assert named.path == tmp_path / "baked"
    inside = resolve(model_path=full_cache / "models--org--tiny", model="org/other")
    assert inside.path == snapshot_folder(full_cache)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["org/tiny", "tiny", "org--tiny"])
def test_folders_of_models_go_before_the_caches(
    hub: Hub, resolve: Callable[..., Snapshot], full_cache: Path, tmp_path: Path, name: str
) -> None:
    folders = [tmp_path / "empty", tmp_path / "a", tmp_path / "b"]
    damaged, whole = (write_model(folder / name) for folder in folders[1:])
    (damaged / SHARD_1).unlink()
    found = resolve(model_dirs=folders)
    assert (found.source, found.name, found.path) == ("MODEL_DIRS", "org/tiny", whole)
    # Which revision a folder holds is not known: where one is asked for, the cache must tell.
    sha = snapshot_folder(full_cache).name
    assert resolve(f"org/tiny@{sha}", model_dirs=folders).source == "cache"
    (whole / SHARD_1).unlink()
    assert resolve(model_dirs=folders).source == "cache"
    assert hub.requests == []


def test_gguf_in_a_folder_of_models(resolve: Callable[..., Snapshot], tmp_path: Path) -> None:
    write_model(tmp_path / "org" / "quants", {"q4.gguf": b"GGUF" + bytes(100)})
    found = resolve("org/quants/q4.gguf", model_dirs=[tmp_path])
    assert (found.source, found.path) == ("MODEL_DIRS", tmp_path / "org" / "quants" / "q4.gguf")


def test_incomplete_runpod_cache_is_left_alone_and_the_volume_filled(
    hub: Hub, resolve: Callable[..., Snapshot], full_cache: Path, tmp_path: Path
) -> None:
    full_cache.rename(tmp_path / "runpod")
    shard = snapshot_folder(tmp_path / "runpod") / SHARD_1
    shard.resolve().write_bytes(b"cut")
    snapshot = resolve()
    assert snapshot.source == "hub"
    assert snapshot.path.is_relative_to(full_cache)
    assert shard.read_bytes() == b"cut"


def test_revision_by_branch(hub: Hub, resolve: Callable[..., Snapshot], cache: Path) -> None:
    sha = hub.add("org/branched", {**MODEL, "config.json": b'{"v": 2}'}, branch="refs/pr/1")
    snapshot = resolve("org/branched@refs/pr/1")
    assert (snapshot.revision, snapshot.name) == (sha, "org/branched")
    hub.forget()
    assert resolve("org/branched@refs/pr/1").source == "cache"
    assert hub.requests == []
    # Fetched under another name only: offline, the one revision that is here serves.
    (cache / "models--org--branched/refs/refs/pr/1").unlink()
    assert resolve("org/branched", offline=True).revision == sha


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("", "org/name"),
        ("org/name/extra", "org/name"),
        ("org/na me", "org/name"),
        ("org/../name", "org/name"),
        ("x" * 5000 + "/" * 2, "org/name"),
        ("org/tiny@", "a branch, a tag or a commit"),
        ("org/tiny@../../etc", "a branch, a tag or a commit"),
        ("./no-such-folder", "does not exist"),
        ("/no/such/folder", "does not exist"),
    ],
)
def test_names_that_cannot_work(
    hub: Hub, resolve: Callable[..., Snapshot], model: str, hint: str
) -> None:
    with pytest.raises(ModelNotFound, match=hint):
        resolve(model)
    assert hub.requests == []


# ---------------------------------------------------------------- which files


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "a.pt"], ["model.safetensors"]),
        (["pytorch_model.bin", "a.pt", "training_args.bin"], ["pytorch_model.bin"]),
        (["a.pt", "a.pth", "a.gguf", "a.h5"], ["a.pt"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["consolidated.00.pth", "model.safetensors"], ["model.safetensors"]),
        (
            ["original/model.safetensors", "onnx/model.bin", "pytorch_model.bin"],
            ["pytorch_model.bin"],
        ),
        (["a.gguf", "b.gguf"], []),
    ],
)
def test_one_kind_of_weights_is_chosen(files: list[str], weights: list[str]) -> None:
    assert select_files([*files, "README.md"]) == weights


def test_model_without_safetensors(resolve: Callable[..., Snapshot], hub: Hub) -> None:
    files = {file: MODEL[file] for file in ("config.json", "tokenizer.json", "pytorch_model.bin")}
    hub.add("org/old", {**files, "optimizer.bin": b"x" * 9000})
    assert files_of(resolve("org/old").path) == sorted(files)


def test_gguf_by_file_name(resolve: Callable[..., Snapshot], hub: Hub) -> None:
    content = b"GGUF" + bytes(9000)
    hub.add("org/quants", {"q4.gguf": content, "q8.gguf": content, "config.json": b"{}"})
    snapshot = resolve("org/quants/q4.gguf")
    assert snapshot.path.name == "q4.gguf"
    assert snapshot.name == "org/quants"
    assert files_of(snapshot.path.parent) == ["config.json", "q4.gguf"]
    assert resolve("org/quants/q4.gguf").source == "cache"


# ---------------------------------------------------------------- damage


def cut_shard(folder: Path) -> None:
    blob = (folder / SHARD_1).resolve()
    blob.write_bytes(blob.read_bytes()[:-1000])


def remove_shard(folder: Path) -> None:
    (folder / SHARD_1).resolve().unlink()
    (folder / SHARD_1).unlink()


def break_link(folder: Path) -> None:
    (folder / SHARD_1).resolve().unlink()


def empty_config(folder: Path) -> None:
    (folder / "config.json").resolve().write_bytes(b"")


def cut_index(folder: Path) -> None:
    blob = (folder / INDEX).resolve()
    blob.write_bytes(blob.read_bytes()[:-3])


DAMAGES = [
    (cut_shard, SHARD_1),
    (remove_shard, SHARD_1),
    (break_link, SHARD_1),
    (empty_config, "config.json"),
    (cut_index, INDEX),
]


@pytest.mark.parametrize("listing", [True, False], ids=["listing", "no-listing"])
@pytest.mark.parametrize(("damage", "file"), DAMAGES)
def test_damage_is_found_before_the_engine_starts(
    resolve: Callable[..., Snapshot],
    full_cache: Path,
    hub: Hub,
    damage: Callable[[Path], None],
    file: str,
    listing: bool,
) -> None:
    if not listing:
        shutil.rmtree(full_cache / "models--org--tiny" / "trees")
    damage(snapshot_folder(full_cache))
    with pytest.raises(ModelIncomplete, match=f"{file}: .*HF_HUB_OFFLINE"):
        resolve(offline=True)
    assert hub.requests == []


def test_all_damage_is_repaired_by_fetching_only_what_is_damaged(
    hub: Hub, resolve: Callable[..., Snapshot], full_cache: Path
) -> None:
    folder = snapshot_folder(full_cache)
    cut_shard(folder)
    break_link(folder)
    empty_config(folder)
    blob = (folder / SHARD_2).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    snapshot = resolve()
    assert snapshot.source == "hub"
    assert {file: (snapshot.path / file).read_bytes() for file in NEEDED} == {
        file: MODEL[file] for file in NEEDED
    }
    assert hub.count("GET /cdn/*") == 2
    assert hub.count("GET *config.json") == 1
    # The commit and its listing were known: nothing but the damaged files is asked for.
    assert hub.count("* /api/*") == 0


def test_the_hub_library_alone_accepts_a_truncated_file(
    full_cache: Path, monkeypatch: pytest.MonkeyPatch, resolve: Callable[..., Snapshot]
) -> None:
    """Why files are checked at all: without the check the damage goes unnoticed."""
    cut_shard(snapshot_folder(full_cache))
    monkeypatch.setattr(model_cache, "check", lambda *_: {})
    assert resolve(offline=True).source == "cache"


def test_a_repair_completes_the_revision_that_is_here(
    hub: Hub, resolve: Callable[..., Snapshot], cache: Path
) -> None:
    old = hub.add("org/moving", MODEL)
    resolve("org/moving")
    hub.add("org/moving", {**MODEL, "config.json": b'{"v": 2}'})
    remove_shard(snapshot_folder(cache, "org/moving"))
    assert resolve("org/moving").revision == old
    # Gone from the Hub: then the branch as it is now.
    remove_shard(snapshot_folder(cache, "org/moving"))
    del hub.repositories["org/moving"].commits[old]
    assert resolve("org/moving").revision == hub.repositories["org/moving"].branches["main"]


@pytest.mark.parametrize(("damage", "file"), DAMAGES)
def test_damaged_folder_is_refused(
    resolve: Callable[..., Snapshot], tmp_path: Path, damage: Callable[[Path], None], file: str
) -> None:
    folder = write_model(tmp_path / "folder")
    assert resolve(str(folder)).path == folder
    if damage is break_link:
        (folder / SHARD_1).rename(tmp_path / "elsewhere")
        (folder / SHARD_1).symlink_to(tmp_path / "elsewhere")
    if damage is remove_shard:
        (folder / SHARD_1).unlink()
    else:
        damage(folder)
    with pytest.raises(ModelIncomplete, match=f"{file}: "):
        resolve(str(folder))
    with pytest.raises(ModelIncomplete, match=f"{file}: "):
        resolve(model_path=folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", struct.pack("<Q", 2) + b"[]"),
        ("model.safetensors", safetensors(100) + b"more"),
        ("pytorch_model.bin", b"PK\x03\x04 cut"),
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\n"),
        ("tokenizer.json", b'{"cut": '),
        (INDEX, b"[]"),
    ],
)
def test_files_that_are_not_what_they_are_called(tmp_path: Path, name: str, content: bytes) -> None:
    files = {"config.json": b"{}", "a.safetensors": safetensors(10), name: content}
    if name.endswith(".bin"):
        del files["a.safetensors"]
    assert list(check(write_model(tmp_path, files))) == ([name] if name != INDEX else [])


# ---------------------------------------------------------------- refusals of the Hub


def test_refusals_say_what_to_do(hub: Hub, resolve: Callable[..., Snapshot], cache: Path) -> None:
    hub.add("org/gated", MODEL, gated=True)
    hub.add("org/private", MODEL, private=True)
    hub.add("org/quants", {"q4.gguf": b"GGUF"})
    hub.add("org/empty", {"README.md": b"nothing here"})
    hub.add("org/bare", {"model.safetensors": MODEL[SHARD_1]})
    (cache.parent / "file").touch()
    wrong = "hf_wrongTokenOfTheTest"
    cases: list[tuple[dict[str, Any], type[ModelError], list[str]]] = [
        ({"model": "org/gated"}, ModelGated, ["accept its licence", "/org/gated", "HF_TOKEN"]),
        ({"model": "org/gated", "token": TOKEN}, ModelGated, ["no access", "fine-grained"]),
        ({"model": "org/tiny", "token": wrong}, ModelGated, ["refuses HF_TOKEN (401)", "unset"]),
        ({"model": "org/nothing"}, ModelNotFound, ["check the name", "set HF_TOKEN"]),
        ({"model": "org/private", "token": TOKEN}, ModelNotFound, ["account that may read it"]),
        (
            {"model": "org/tiny@v9"},
            ModelNotFound,
            ["no revision 'v9'", "/api/models/org/tiny/refs"],
        ),
        ({"model": "org/quants"}, ModelNotFound, ["choose a GGUF file as org/quants/q4.gguf"]),
        ({"model": "org/empty"}, ModelNotFound, ["no weights", ".safetensors"]),
        ({"model": "org/bare"}, ModelNotFound, ["org/bare: ", "no config.json", "revision"]),
        ({"hub_cache": cache.parent / "file" / "hub"}, ModelError, ["cannot write", "HF_HOME"]),
        ({"hub_cache": Path("/proc/nope/hub")}, ModelError, ["cannot write", "/proc/nope/hub"]),
        ({"hub_cache": Path("/sys/fs")}, ModelError, ["cannot write", "/sys/fs"]),
    ]

    def refusal(settings: dict[str, Any]) -> ModelError:
        with pytest.raises(ModelError) as raised:
            resolve(patience=THRICE, **settings)
        return raised.value

    with ThreadPoolExecutor(4) as pool:
        errors = list(pool.map(refusal, [settings for settings, _, _ in cases]))
    for error, (settings, kind, words) in zip(errors, cases, strict=True):
        assert type(error) is kind, settings
        assert all(word in str(error) for word in words), str(error)
        assert TOKEN not in str(error)
        assert wrong not in str(error)
    # Not one of them is worth a second try.
    assert hub.count("GET /api/models/org/nothing/*") == 1
    assert hub.count("GET */org/bare/*safetensors") == 0, "the listing shows what it lacks"


def test_offline_with_nothing(hub: Hub, resolve: Callable[..., Snapshot]) -> None:
    with pytest.raises(ModelOffline, match="HF_HUB_OFFLINE is set: unset it"):
        resolve(offline=True)
    assert hub.requests == []


def test_unreachable_hub(
    hub: Hub, resolve: Callable[..., Snapshot], downloaded: Path, cache: Path
) -> None:
    dead = "http://127.0.0.1:9"
    with pytest.raises(ModelOffline, match=f"{dead}.*check the network and HF_ENDPOINT"):
        resolve(endpoint=dead)
    assert not (cache / "models--org--tiny").exists()
    shutil.copytree(downloaded, cache, symlinks=True, dirs_exist_ok=True)
    assert resolve(endpoint=dead).source == "cache"
    remove_shard(snapshot_folder(cache))
    with pytest.raises(ModelIncomplete, match=f"{SHARD_1}: missing.*{dead}"):
        resolve(endpoint=dead, patience=Patience(attempts=1, stall_s=2))


# ---------------------------------------------------------------- faults on the way


def test_a_reset_is_tried_again_and_finished_files_are_kept(
    hub: Hub, resolve: Callable[..., Snapshot], caplog: pytest.LogCaptureFixture
) -> None:
    hub.fault("reset", path=f"/cdn/*{SHARD_2}", after_bytes=100_000)
    assert resolve(patience=THRICE).source == "hub"
    assert "the connection failed or broke off" in caplog.text
    assert "trying again" in caplog.text
    assert "s3cret" not in caplog.text, "signed addresses stay out of the log"
    assert hub.count(f"GET /cdn/*{SHARD_1}") == 1
    assert hub.count(f"GET /cdn/*{SHARD_2}") == 2


def test_a_hub_that_asks_to_wait_is_obeyed(
    hub: Hub, resolve: Callable[..., Snapshot], caplog: pytest.LogCaptureFixture
) -> None:
    """Asked for by the API, which the library does not sit out, and by the files, which it does."""
    hub.fault("status", path="*/revision/*", status=429, headers={"Retry-After": "1"})
    hub.fault("status", path=f"/cdn/*{SHARD_2}", status=429, headers={"Retry-After": "2"})
    began = time.monotonic()
    assert resolve(patience=Patience(attempts=4, backoff_s=0.05, stall_s=2.0)).source == "hub"
    assert time.monotonic() - began > 3
    assert "the Hub is busy or limits requests" in caplog.text
    assert "the download stalled" not in caplog.text, "waiting as asked is no stall"


def test_a_body_that_ends_early_is_resumed_within_the_attempt(
    hub: Hub, resolve: Callable[..., Snapshot]
) -> None:
    hub.fault("cut", path=f"/cdn/*{SHARD_2}", after_bytes=280_000)
    assert resolve().source == "hub"
    assert hub.ranges == ["bytes=262144-"]


def test_faults_that_stay_end_in_an_error(
    hub: Hub, resolve: Callable[..., Snapshot], tmp_path: Path
) -> None:
    hub.add("org/short", MODEL)
    hub.add("org/busy", MODEL)
    hub.fault("short", path=f"/cdn/org/short/*{SHARD_2}", after_bytes=1000, times=99)
    hub.fault("status", path=f"/cdn/org/busy/*{SHARD_2}", status=503, times=99)
    twice = Patience(attempts=2, backoff_s=0.05)
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(resolve, "org/short", patience=twice)
        busy = pool.submit(resolve, "org/busy", patience=twice)
        with pytest.raises(ModelIncomplete, match=r"after 2 downloads .*300117 but has size 1000"):
            short.result()
        with pytest.raises(ModelOffline, match=r"the Hub is busy or limits requests .*503"):
            busy.result()
    assert hub.count(f"GET /cdn/org/busy/*{SHARD_2}") == 2


def test_a_stalled_download_is_ended_and_tried_again(
    hub: Hub, resolve: Callable[..., Snapshot], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fault("stall", path=f"/cdn/*{SHARD_2}", after_bytes=100_000)
    patience = Patience(attempts=4, backoff_s=0.05, stall_s=1.5)
    assert resolve(patience=patience).source == "hub"
    # The library itself would have waited longer, and in vain.
    assert "the download stalled (no bytes for" in caplog.text
    assert list(cache.rglob("*.incomplete")) == []


def test_a_lock_that_outlived_its_owner_holds_nobody_up(
    hub: Hub, resolve: Callable[..., Snapshot], full_cache: Path
) -> None:
    folder = snapshot_folder(full_cache)
    blob = (folder / SHARD_1).resolve()
    lock = full_cache / ".locks" / "models--org--tiny" / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    remove_shard(folder)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert resolve(patience=Patience(attempts=4, backoff_s=0.05, stall_s=1.5)).source == "hub"


def test_a_killed_worker_leaves_a_cache_that_the_next_one_completes(
    hub: Hub, resolve: Callable[..., Snapshot], cache: Path, tmp_path: Path
) -> None:
    hub.fault("stall", path=f"/cdn/*{SHARD_2}", after_bytes=280_000)
    script = (
        "import sys; from pathlib import Path; import utils; "
        "utils.resolve('org/tiny', hub_cache=Path(sys.argv[1]), endpoint=sys.argv[2])"
    )
    command = [sys.executable, "-c", script, str(cache), hub.url]
    with subprocess.Popen(command, cwd=ROOT) as worker:
        until(lambda: hub.count(f"GET /cdn/*{SHARD_2}") and hub.count(f"GET /cdn/*{SHARD_1}"))
        until(lambda: any(p.stat().st_size for p in cache.rglob("*.incomplete")))
        worker.send_signal(signal.SIGKILL)
    # Its download process ends with it and cleans up.
    until(lambda: not list(cache.rglob("*.incomplete")))
    hub.forget()
    assert resolve().source == "hub"
    assert hub.count(f"GET /cdn/*{SHARD_2}") == 1
    assert hub.count(f"GET /cdn/*{SHARD_1}") <= 1


def test_orphans_of_the_past_are_removed(
    hub: Hub, resolve: Callable[..., Snapshot], full_cache: Path
) -> None:
    blobs = full_cache / "models--org--tiny" / "blobs"
    old, young = blobs / "a.1.incomplete", blobs / "b.2.incomplete"
    old.write_bytes(b"x" * 100)
    young.write_bytes(b"x" * 100)
    os.utime(old, (time.time() - 7200,) * 2)
    remove_shard(snapshot_folder(full_cache))
    resolve()
    assert not old.exists()
    assert young.exists()


def test_full_disk_names_what_is_needed(
    hub: Hub, resolve: Callable[..., Snapshot], tmp_path: Path
) -> None:
    """On a full file system where one may be mounted, else with a limit on the size of files."""
    with no_room(tmp_path / "volume"):
        wanted = r"no room for org/tiny in .*volume.* GB more \(0\.00 GB in all\).*HF_HOME"
        with pytest.raises(DiskFull, match=wanted):
            resolve(hub_cache=tmp_path / "volume" / "hub", patience=THRICE)
    assert hub.count(f"GET /cdn/*{SHARD_2}") == 1, "a full disk is not tried again"


def test_room_is_made_of_what_killed_downloads_left(
    hub: Hub, resolve: Callable[..., Snapshot], tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    with no_room(volume, size="800k"):
        if not volume.is_mount():
            pytest.skip("no file system may be mounted here")
        blobs = volume / "hub" / "models--org--tiny" / "blobs"
        blobs.mkdir(parents=True)
        orphan = blobs / "a.1.incomplete"
        orphan.write_bytes(bytes(500_000))
        # Written to longer ago than a download is believed in, but within the hour.
        os.utime(orphan, (time.time() - 600,) * 2)
        assert resolve(hub_cache=volume / "hub").source == "hub"
        assert not orphan.exists()


@contextlib.contextmanager
def no_room(volume: Path, size: str = "350k") -> Iterator[None]:
    volume.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(volume)]
    mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", str(volume)], check=True)


def test_progress_is_told_but_not_too_often(
    resolve: Callable[..., Snapshot], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "utils")
    with Hub(bytes_per_s=250_000).serving() as slow:
        slow.add("org/tiny", MODEL)
        resolve(endpoint=slow.url, patience=Patience(attempts=1, log_every_s=0.4))
    lines = [record.getMessage() for record in caplog.records if "MB/s" in record.getMessage()]
    assert 2 <= len(lines) <= 6, lines
    assert all(
        f" % of {human_size(NEEDED_BYTES)}, " in line and "s left" in line for line in lines[:-1]
    ), lines


def test_a_long_download_does_not_flood_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress("org/name", tmp_path, 5.0, logging.getLogger("utils"))
    progress.begin(Manifest("0" * 40, {"model.safetensors": 10**12}))
    for _ in range(3600):
        now += 1
        progress.measure()
    assert 20 <= len(caplog.messages) <= 80


# ---------------------------------------------------------------- diagnosis


def test_errors_of_the_storage_backend_are_understood() -> None:
    """hf_xet tells an errno in its text only; the test Hub does not speak its protocol."""
    from hub_download import diagnose

    full = RuntimeError(f"I/O error: No space left on device (os error {errno.ENOSPC})")
    assert diagnose(full)["kind"] == "room"
    assert diagnose(OSError(errno.EDQUOT, "quota"))["kind"] == "room"
    assert diagnose(RuntimeError("CAS request failed"))["kind"] == "network"
    assert diagnose(ValueError("bug"))["kind"] == "unexpected"
