"""LoRA adapters among the entries of MODELS: which they are, whose they are, whether they fit.

Owns what files can tell of that: PEFT's `adapter_config.json`, the headers of the weights and those
of the base model. That an adapter works is only known once the engine has loaded it and answered
with it, which is engine.py's part. Knows nothing of vLLM, so that it serves before its import too.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from errors import ConfigError

log = logging.getLogger("worker.engine")

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OTHER_WEIGHTS = ("adapter_model.bin", "adapter_model.pt")
WHOLE_MODELS = ("model*.safetensors", "pytorch_model*.bin", "consolidated*")
"""What the weights of models are called that are no adapters."""

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_LORA = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.\w+)?\.weight$")
_IN_LAYERS = re.compile(r"\w+\.\d+\..+$")
_SHOWN = 3


class Entry(Protocol):
    """An entry of MODELS on disk, as `utils.Snapshot` is one."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> Path: ...


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that may be served under its name; `base` is what it was trained on."""

    name: str
    path: Path
    rank: int
    base: str


@dataclass(frozen=True)
class Family:
    """What one engine serves: a base model and the adapters beside it."""

    name: str
    path: Path
    adapters: tuple[Adapter, ...] = ()


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own.

    Adapters may come with their base's `config.json`, and merged models with the `adapter_config`
    of what was merged: the weights decide.
    """
    whole = (file for pattern in WHOLE_MODELS for file in path.glob(pattern))
    return (path / CONFIG).is_file() and next(whole, None) is None


def families(entries: Sequence[Entry]) -> list[Family]:
    """Return each base model of MODELS with its adapters, in the order of MODELS.

    An adapter belongs to the base model that its configuration names, or else to the first
    one. ConfigError names every adapter that is broken or cannot fit its base.
    """
    bases = [entry for entry in entries if not is_adapter(entry.path)]
    if not bases or is_adapter(entries[0].path):
        raise ConfigError(
            [f"MODELS begins with the adapter {entries[0].name}: put its base model before it"]
        )
    faults: list[str] = []
    adapters: dict[str, list[Adapter]] = {base.name: [] for base in bases}
    for entry in entries:
        if not is_adapter(entry.path):
            continue
        try:
            adapter = read(entry.name, entry.path)
            base = _base(adapter, bases)
            check_fit(adapter, base.path)
            adapters[base.name].append(adapter)
        except ValueError as error:
            faults.append(f"the adapter {entry.name} cannot be served: {error}")
    names = [entry.name for entry in entries]
    faults += [
        f"MODELS has several entries called {name}: requests could not tell them apart"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if faults:
        raise ConfigError(faults)
    return [Family(base.name, base.path, tuple(adapters[base.name])) for base in bases]


def _base(adapter: Adapter, bases: Sequence[Entry]) -> Entry:
    for same in (str, _last):
        named = [base for base in bases if same(base.name) == same(adapter.base)]
        if len(named) == 1:
            return named[0]
    # What it is called proves nothing: a quantised copy of the same model has another name.
    log.warning(
        "the adapter %s was made for %s and is served on %s",
        adapter.name,
        adapter.base or "a model that it does not name",
        bases[0].name,
    )
    return bases[0]


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


# --- one adapter ------------------------------------------------------------------------------


def read(name: str, path: Path) -> Adapter:
    """Return the adapter in a folder; ValueError says what is wrong with it."""
    try:
        config = json.loads((path / CONFIG).read_bytes())
    except ValueError:
        raise ValueError(f"{CONFIG} is not JSON") from None
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} is not a JSON object")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"it is of the kind {kind}, and only LoRA adapters can be served")
    ranks = [config.get("r"), *_mapping(config, "rank_pattern").values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise ValueError(f"{CONFIG} has no rank `r` above 0")
    if not (path / WEIGHTS).is_file():
        if not any((path / other).is_file() for other in OTHER_WEIGHTS):
            raise ValueError(f"its weights are missing: there is no {WEIGHTS}")
    else:
        _check_ranks(_modules(path), config)
    return Adapter(name, path, max(ranks), str(config.get("base_model_name_or_path") or ""))


def _mapping(config: Mapping[str, Any], member: str) -> Mapping[str, Any]:
    value = config.get(member) or {}
    if not isinstance(value, dict):
        raise ValueError(f"`{member}` of {CONFIG} is not an object")
    return value


@dataclass
class _Module:
    """What an adapter adds to one matrix: a (rank, in) times b (out, rank)."""

    a: tuple[int, ...] = ()
    b: tuple[int, ...] = ()


def _modules(path: Path) -> dict[str, _Module]:
    modules: dict[str, _Module] = {}
    for name, (_, shape) in _tensors(path / WEIGHTS):
        if match := _LORA.match(name):
            module = modules.setdefault(match[1], _Module())
            setattr(module, match[2].lower(), shape)
    if not modules:
        raise ValueError(f"{WEIGHTS} holds no LoRA weights")
    return modules


def _tensors(file: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yield name, dtype and shape of each tensor; reads the file's header only."""
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_slice(name)
                yield name, (tensor.get_dtype(), tuple(tensor.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} is damaged ({error}); copy it again") from None


def _check_ranks(modules: Mapping[str, _Module], config: Mapping[str, Any]) -> None:
    for name, module in modules.items():
        if not module.a or not module.b:
            raise ValueError(f"{name} has only one half of its weights in {WEIGHTS}")
        # Experts of one layer may lie in one tensor; convolutions have more dimensions.
        if ".experts" in name or len(module.a) != 2 or len(module.b) != 2:
            continue
        if module.a[0] != module.b[1]:
            raise ValueError(
                f"the halves of {name} have the ranks {module.a[0]} and {module.b[1]}: "
                "they do not belong together"
            )
        if module.a[0] != config["r"] and not config.get("rank_pattern"):
            raise ValueError(
                f"{CONFIG} says rank {config['r']}, but {name} has rank {module.a[0]}: "
                "configuration and weights do not belong together"
            )


# --- and its base -----------------------------------------------------------------------------


def check_fit(adapter: Adapter, base: Path) -> None:
    """Compare an adapter's weights with those of the model in `base`; ValueError if they differ.

    vLLM does not: it ignores what the base lacks, and pads what is too small. What cannot be
    told from the headers (quantised weights, other formats) counts as fitting.
    """
    config = json.loads((adapter.path / CONFIG).read_bytes())
    if not (adapter.path / WEIGHTS).is_file() or config.get("fan_in_fan_out"):
        return
    matrices: dict[str, list[tuple[int, ...]]] = {}
    """The shapes of a base model's modules, by where they stand in its layers; often one each."""
    for file in sorted(base.glob("*.safetensors")):
        if file.name.startswith("consolidated"):
            continue  # Mistral's own format, with other names for all modules
        for name, (dtype, shape) in _tensors(file):
            owner, _, part = name.rpartition(".")
            if found := _IN_LAYERS.search(owner):
                known = part == "weight" and dtype in _FLOATS and len(shape) == 2
                matrices.setdefault(found[0], []).append(shape if known else ())
    # Where the base calls its layers something else, vLLM knows the translation.
    containers = {place.partition(".")[0] for place in matrices}
    absent, misfits = [], []
    for name, module in _modules(adapter.path).items():
        place = _IN_LAYERS.search(name)
        if place is None or ".experts" in name:
            continue
        shapes = matrices.get(place[0])
        if shapes is None:
            if place[0].partition(".")[0] in containers:
                absent.append(name)
        elif all(shapes) and (module.b[0], module.a[1]) not in shapes:
            misfits.append(
                f"{name} is {_size((module.b[0], module.a[1]))} in the adapter and "
                f"{_size(shapes[0])} in the base"
            )
    if misfits:
        raise ValueError(f"it does not fit its base model: {_listed(misfits)}")
    if absent:
        raise ValueError(f"its base model does not have {_listed(absent)}")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _listed(items: Sequence[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
