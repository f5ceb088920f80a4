"""LoRA adapters: told apart, read and compared with their base, all without an engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine_adapters import CONFIG, WEIGHTS, Family, families
from errors import ConfigError
from tests.adapters import make_adapter
from tools import tiny_models

TINY = tiny_models.MODELS / "tiny-llama"


@dataclass(frozen=True)
class Entry:
    name: str
    path: Path


@pytest.fixture(scope="module", autouse=True)
def tiny() -> None:
    tiny_models.make_tiny_llama(TINY)


BASE = Entry("tiny-llama", TINY)


def test_an_entry_with_an_adapters_configuration_is_one(tmp_path: Path) -> None:
    alpha = Entry("org/alpha", make_adapter(tmp_path / "alpha", rank=4))
    beta = Entry("beta", make_adapter(tmp_path / "beta", rank=4, rank_pattern={"o_proj": 12}))
    (family,) = families([BASE, alpha, beta])
    assert (family.name, family.path) == (BASE.name, TINY)
    assert [(each.name, each.rank) for each in family.adapters] == [("org/alpha", 4), ("beta", 12)]
    assert families([BASE]) == [Family("tiny-llama", TINY)]
    # With its base's configuration beside it, and a model with that of an adapter merged into it.
    (alpha.path / "config.json").write_text("{}")
    (alpha.path / "training_args.bin").touch()
    merged = Entry("merged", make_adapter(tmp_path / "merged"))
    (merged.path / "model-00001-of-00001.safetensors").touch()
    assert [each.name for each in families([BASE, alpha, merged])] == ["tiny-llama", "merged"]


def test_an_adapter_is_its_bases_or_else_the_first_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Entry("org/other", TINY)
    entries = [
        BASE,
        Entry("of-other", make_adapter(tmp_path / "a", base_model_name_or_path="org/other")),
        Entry("of-folder", make_adapter(tmp_path / "b", base_model_name_or_path="./x/Other/")),
        Entry("of-none", make_adapter(tmp_path / "c", base_model_name_or_path=None)),
        other,
    ]
    first, second = families(entries)
    assert [each.name for each in first.adapters] == ["of-none"]
    assert [each.name for each in second.adapters] == ["of-other", "of-folder"]
    assert "of-none" in caplog.text and "of-other" not in caplog.text


def test_the_base_comes_first(tmp_path: Path) -> None:
    adapter = Entry("alpha", make_adapter(tmp_path / "alpha"))
    with pytest.raises(ConfigError, match=r"begins with the adapter alpha"):
        families([adapter, BASE])


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    pair = [Entry("same", make_adapter(tmp_path / name)) for name in "ab"]
    with pytest.raises(ConfigError, match="several entries called same"):
        families([BASE, *pair])


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"layers": 5}, r"does not have model\.layers\.2\.self_attn\..*and 3 more"),
        ({"hidden": 32}, r"_proj is 32 x 32 in the adapter and 64 x 64 in the base"),
        ({"hidden": 128}, r"does not fit its base"),
        ({"modules": ("self_attn.q_proj", "mlp.q_proj")}, r"does not have .*mlp\.q_proj"),
        ({"modules": ("mlp.q_proj",)}, r"does not have .*mlp\.q_proj"),
        ({"r": 8}, r"says rank 8, but model\.layers\.0\..* has rank 4"),
        ({"r": 0}, "no rank"),
        ({"r": None}, "no rank"),
        ({"rank_pattern": {"q_proj": "x"}}, "no rank"),
        ({"rank_pattern": [1]}, "`rank_pattern`"),
        ({"peft_type": "IA3"}, "of the kind IA3"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_fit_is_named_with_its_reason(
    tmp_path: Path, made: dict[str, Any], says: str
) -> None:
    fine = Entry("fine", make_adapter(tmp_path / "fine"))
    broken = Entry("org/broken", make_adapter(tmp_path / "broken", **made))
    with pytest.raises(
        ConfigError, match=rf"the adapter org/broken cannot be served: .*{says}"
    ) as e:
        families([BASE, broken, fine])
    assert len(e.value.faults) == 1


def test_a_base_in_another_form_is_left_to_vllm(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "consolidated.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    odd = Entry("odd", make_adapter(tmp_path / "odd", modules=("mlp.q_proj",)))
    (family,) = families([Entry("base", base), odd])
    assert [adapter.name for adapter in family.adapters] == ["odd"]


def _damage(folder: Path, what: str) -> None:
    weights = folder / WEIGHTS
    match what:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "cut in its header":
            weights.write_bytes(weights.read_bytes()[:20])
        case "a pointer":
            weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
        case "missing":
            weights.unlink()
        case "another's":
            weights.write_bytes((TINY / "model.safetensors").read_bytes())
        case "not JSON":
            (folder / CONFIG).write_text("{")
        case "no object":
            (folder / CONFIG).write_text("[]")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("truncated", "damaged"),
        ("cut in its header", "damaged"),
        ("a pointer", "damaged"),
        ("missing", "weights are missing"),
        ("another's", "holds no LoRA weights"),
        ("not JSON", "not JSON"),
        ("no object", "not a JSON object"),
    ],
)
def test_a_broken_adapter_is_named_with_its_reason(tmp_path: Path, what: str, says: str) -> None:
    folder = make_adapter(tmp_path / "broken")
    _damage(folder, what)
    with pytest.raises(ConfigError, match=f"the adapter broken cannot be served: .*{says}"):
        families([BASE, Entry("broken", folder)])


def test_what_headers_cannot_tell_counts_as_fitting(tmp_path: Path) -> None:
    # A base that goes by names of its own, as after a conversion: vLLM knows the translation.
    from safetensors.numpy import load_file, save_file

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    adapter = make_adapter(tmp_path / "adapter")
    stored = load_file(adapter / WEIGHTS)
    save_file({"blocks.0.q": next(iter(stored.values()))}, base / "model.safetensors")
    (family,) = families([Entry("base", base), Entry("adapter", adapter)])
    assert family.adapters


def test_faults_of_all_adapters_come_together(tmp_path: Path) -> None:
    entries = [Entry(name, make_adapter(tmp_path / name, r=9)) for name in ("one", "two")]
    with pytest.raises(ConfigError) as raised:
        families([BASE, *entries])
    assert [fault.split()[2] for fault in raised.value.faults] == ["one", "two"]
