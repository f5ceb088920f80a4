"""The process beside vLLM's import, for what it does with a model that is on disk."""

import json
from pathlib import Path

import pytest

from errors import ModelTooLarge
from preparation import Job, Preparation
from readiness import Readiness
from tests.test_model_plan import MODEL
from tests.wait import until

SHARDS = [name for name in MODEL if name.startswith("model-0") and name.endswith("safetensors")]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name, content in MODEL.items():
        if not name.endswith(".gguf"):
            (tmp_path / name).write_bytes(content)
    return tmp_path


def prepared(
    model: Path, *more: Path, may_swap: bool = False, **options: str
) -> tuple[Preparation, Readiness]:
    readiness = Readiness()
    job = Job(
        [str(model), *map(str, more)],
        hub_cache=str(model / "none"),
        options=options,
        may_swap=may_swap,
    )
    return Preparation(job, readiness), readiness


def test_it_finds_the_model_and_reads_its_weights(model: Path) -> None:
    preparation, readiness = prepared(model)
    (snapshot,) = preparation.snapshots()
    assert snapshot.path == model
    assert read_bytes(preparation, readiness) == sum(len(MODEL[file]) for file in SHARDS)


def read_bytes(preparation: Preparation, readiness: Readiness) -> int | float | str:
    """Return how much was read into the page cache, once it was."""
    until(lambda: "prefetch" in {phase.name for phase in readiness.phases}, 30)
    preparation.finish()
    (facts,) = (phase.facts for phase in readiness.phases if phase.name == "prefetch")
    return facts["bytes"]


def test_a_model_that_cannot_fit_ends_the_start_before_the_engine(model: Path) -> None:
    preparation, readiness = prepared(model, MAX_MODEL_LEN="4k", KV_CACHE_MEMORY_BYTES="1000")
    with pytest.raises(ModelTooLarge, match=r"cannot fit: it needs .* for one sequence of 4,000"):
        preparation.snapshots()
    preparation.finish()
    assert "prefetch" not in {phase.name for phase in readiness.phases}


def test_another_model_has_to_fit_where_it_may_be_loaded(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    larger = tmp_path_factory.mktemp("larger")
    for file in model.iterdir():
        (larger / file.name).write_bytes(file.read_bytes())
    config = json.loads((larger / "config.json").read_text())
    config["num_hidden_layers"] *= 100
    (larger / "config.json").write_text(json.dumps(config))
    memory = "100000000"  # enough for one sequence of the first
    preparation, _ = prepared(model, larger, MAX_MODEL_LEN="4k", KV_CACHE_MEMORY_BYTES=memory)
    assert len(preparation.snapshots()) == 2
    preparation.finish()
    preparation, _ = prepared(
        model, larger, may_swap=True, MAX_MODEL_LEN="4k", KV_CACHE_MEMORY_BYTES=memory
    )
    with pytest.raises(ModelTooLarge, match=f"^{larger.name} cannot fit: it needs"):
        preparation.snapshots()
    preparation.finish()


def test_an_adapter_that_stands_first_is_not_taken_for_the_model(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    adapter = tmp_path_factory.mktemp("adapter")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (adapter / "adapter_model.safetensors").write_bytes(MODEL[SHARDS[0]])
    preparation, readiness = prepared(adapter, model)
    assert [each.path for each in preparation.snapshots()] == [adapter, model]
    assert read_bytes(preparation, readiness) == sum(len(MODEL[file]) for file in SHARDS)


def test_a_merged_model_that_kept_its_adapters_configuration_is_a_model(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    preparation, readiness = prepared(model)
    preparation.snapshots()
    assert read_bytes(preparation, readiness) == sum(len(MODEL[file]) for file in SHARDS)
