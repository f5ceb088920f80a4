"""The checks that the SDK runs before a worker takes jobs."""

from pathlib import Path

import pytest

import fitness
from errors import ConfigError, EngineDead, ModelIncomplete
from keys import KeyRing, generate_key

KEYS = f"a={generate_key()},b={generate_key()}"


def checks(folder: Path, keys: str = KEYS, *, dead: bool = False) -> dict[str, fitness.Check]:
    files = fitness.files_of([folder])
    found = fitness.checks(KeyRing.parse(keys), "endpoint", files, lambda: dead)
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


def test_a_model_may_be_a_single_file(tmp_path: Path) -> None:
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"GGUF")
    assert fitness.files_of([weights]) == {weights: 4}


def test_what_is_no_file_of_a_model_may_change(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("a")
    check = checks(tmp_path)["model_files"]
    (tmp_path / "notes.md").write_text("abc")
    check()


@pytest.mark.parametrize("terms", ["not_before=2999-01-01", "not_after=2001-01-01", "revoked"])
def test_a_key_that_is_not_good_now_says_nothing_of_the_worker(tmp_path: Path, terms: str) -> None:
    keys = f"a={generate_key()};{terms}"
    checks(tmp_path, keys)["key"]()
    checks(tmp_path, f"{keys},{generate_key()}")["key"]()


def test_a_key_that_does_not_open_what_it_has_sealed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = f"a={generate_key()},b={generate_key()};revoked"
    monkeypatch.setattr(fitness, "seal_request", lambda request, key: "1.nonsense")
    with pytest.raises(ConfigError, match="does not open what it has sealed") as caught:
        checks(tmp_path, keys)["key"]()
    assert KeyRing.parse(keys).first.id in str(caught.value)


def test_a_dead_engine_is_unfit(tmp_path: Path) -> None:
    with pytest.raises(EngineDead):
        checks(tmp_path, dead=True)["engine_process"]()
