"""The checks that the SDK runs before a worker takes jobs."""

from pathlib import Path

import pytest

import fitness
from errors import EngineDead, ModelIncomplete
from keys import KeyRing, generate_key


def checks(folder: Path, *, dead: bool = False) -> dict[str, fitness.Check]:
    keys = KeyRing.parse(f"a={generate_key()},b={generate_key()}")
    files = fitness.files_of([folder])
    found = fitness.checks(keys, "endpoint", files, lambda: dead)
    return {check.__name__: check for check in found}


def test_a_sound_worker_passes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = checks(tmp_path)
    assert list(found) == ["key", "model_files", "engine_process"]
    for check in found.values():
        check()


@pytest.mark.parametrize("content", [None, b"", b"weigh"])
def test_files_that_have_changed_are_named(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    check = checks(tmp_path)["model_files"]
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)
    with pytest.raises(ModelIncomplete, match=f"{len(content or b'')} bytes, and had 7"):
        check()


def test_what_is_no_file_of_a_model_may_change(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("a")
    check = checks(tmp_path)["model_files"]
    (tmp_path / "notes.md").write_text("abc")
    check()


def test_a_dead_engine_is_unfit(tmp_path: Path) -> None:
    with pytest.raises(EngineDead):
        checks(tmp_path, dead=True)["engine_process"]()
