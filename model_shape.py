"""What a model's files say about its size: tensors by their headers, attention by its config.

Reads JSON and headers only, from a folder or from what somebody else fetched. Knows neither
devices nor settings; what it cannot tell it calls unknown instead of guessing, and what cannot be
read at all is a ModelIncomplete that names the file.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import ModelIncomplete
from model_files import listing, loaded, size_of, weights

ADAPTER_CONFIG = "adapter_config.json"

_CURE = (
    "`python utils.py verify MODEL --sha256 --repair` fetches damaged files again; in a folder of "
    "your own, copy it again"
)

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The dtypes of safetensors that a loader converts to the model's own, in bytes."""

DTYPES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
"""The dtypes of configurations and of the setting DTYPE, in bytes."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.\d+\.")
_GENERATES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_STATEFUL = re.compile(r"[mbjz]amba|rwkv|retnet", re.IGNORECASE)
# Members of a configuration whose layers keep something else than keys and values.
_HYBRID = re.compile(
    r"mamba|ssm_|ssm$|hybrid|linear_(?:attn|num|conv|key|value)|conv_L|rwkv|index_"
)


@dataclass(frozen=True)
class Tensor:
    """One tensor as its file's header tells of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored_bytes: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def in_layer(self) -> bool:
        """Whether it belongs to one of the repeated layers, so that a pipeline divides it."""
        return bool(_LAYER.search(self.name))

    @property
    def is_linear(self) -> bool:
        """Whether it is a weight that quantisation makes smaller: a matrix inside a layer."""
        return self.in_layer and len(self.shape) >= 2 and self.dtype in FLOATS


@dataclass(frozen=True)
class Attention:
    """What one token leaves in the KV cache, in numbers per layer and device."""

    layers: int
    heads: int
    numbers_per_head: int
    """Key and value together."""
    latent: int = 0
    """Instead of heads: the numbers of one compressed vector (MLA), whole on every device."""
    windowed_layers: int = 0
    """Of `layers`, those that remember `window` tokens only."""
    window: int = 0


@dataclass(frozen=True)
class Shape:
    """A model as far as its size in memory goes.

    `tensors` is empty where the files have no readable header; `file_bytes` is always known.
    """

    file_bytes: int
    tensors: tuple[Tensor, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    attention: Attention | None = None
    unknown: str = ""
    """Why `attention` is not known."""
    adapter_of: str | None = None
    """Of a LoRA adapter the base model, as far as it names one; None where it is a model."""

    @property
    def dtype(self) -> str:
        """The dtype that the configuration names."""
        text = _text_config(self.config)
        for each in (self.config, text):
            name = each.get("dtype") or each.get("torch_dtype")
            if isinstance(name, str):
                return name.removeprefix("torch.")
        return ""

    @property
    def quantization(self) -> Mapping[str, Any]:
        """How the stored weights are quantised; empty where they are not."""
        found = self.config.get("quantization_config") or _text_config(self.config).get(
            "quantization_config"
        )
        return found if isinstance(found, Mapping) else {}

    @property
    def max_model_len(self) -> int | None:
        """The longest sequence that the configuration allows."""
        text = _text_config(self.config)
        length = _number(
            text, "max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"
        )
        rope = text.get("rope_scaling") or text.get("rope_parameters")
        if length and isinstance(rope, Mapping):
            factor, kind = rope.get("factor"), rope.get("rope_type") or rope.get("type")
            if isinstance(factor, int | float) and kind in ("linear", "dynamic", "yarn"):
                original = rope.get("original_max_position_embeddings")
                length = int((original if isinstance(original, int) else length) * factor)
        return length

    def number(self, *names: str) -> int | None:
        """Return the first of the configuration's members that is a whole number."""
        return _number(_text_config(self.config), *names)

    @property
    def is_tied(self) -> bool:
        """Whether the embedding serves as the head too, whatever the files hold."""
        return bool(self.config.get("tie_word_embeddings"))

    @property
    def has_experts(self) -> bool:
        """Whether layers hold experts, of which each token uses a few."""
        return bool(self.number("num_experts", "num_local_experts", "n_routed_experts"))


def of_folder(path: Path) -> Shape:
    """Return the shape of a model on disk: a folder, or a GGUF file."""
    if path.is_file():
        return Shape(size_of(path) or 0, unknown="a GGUF file's own header is not read")
    names = listing(path)
    files = loaded(names)
    sizes = {file: size_of(path / file) or 0 for file in files}
    if is_adapter(names):
        return of_adapter(
            parsed((path / ADAPTER_CONFIG).read_bytes(), path / ADAPTER_CONFIG), sizes
        )
    try:
        config = parsed((path / "config.json").read_bytes(), path / "config.json")
    except OSError:
        config = {}
    headers = {file: header(path / file) for file in files if file.endswith(".safetensors")}
    return of_parts(config, sizes, headers)


def header(path: Path) -> Mapping[str, Any]:
    """Return a safetensors file's header: 8 bytes little-endian length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # Anything may stand there; a length beyond the end is cut off, and then no JSON.
        return parsed(file.read(min(length, size_of(path) or 0)), f"the header of {path}")


def parsed(content: bytes, what: Path | str, cure: str = _CURE) -> Mapping[str, Any]:
    """Return a file's JSON object; ModelIncomplete says of `what` that it holds none."""
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, Mapping):
        raise ModelIncomplete(f"{what} is damaged, it holds no JSON object: {cure}")
    return found


def is_adapter(files: Sequence[str]) -> bool:
    """Whether these are the files of a LoRA adapter, which may bring its base's config.json."""
    found = weights(files, None)
    own = all(Path(file).name.startswith("adapter_model") for file in found)
    return ADAPTER_CONFIG in files and bool(found) and own


def of_adapter(config: Mapping[str, Any], sizes: Mapping[str, int]) -> Shape:
    """Return the shape of a LoRA adapter, which only works on its base model."""
    base = config.get("base_model_name_or_path")
    return Shape(sum(sizes.values()), adapter_of=base if isinstance(base, str) else "")


def of_parts(
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    headers: Mapping[str, Mapping[str, Any]],
) -> Shape:
    """Return the shape that a configuration, the sizes of the weights and their headers tell."""
    tensors = [tensor for file, found in headers.items() for tensor in _tensors(file, found)]
    attention, unknown = _attention(config)
    return Shape(sum(sizes.values()), tuple(tensors), config, attention, unknown)


def _tensors(file: str, header: Mapping[str, Any]) -> Iterator[Tensor]:
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield Tensor(name, entry["dtype"], tuple(map(int, entry["shape"])), end - begin)
    except (KeyError, TypeError, ValueError):
        raise ModelIncomplete(f"the header of {file} is not that of safetensors") from None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a multimodal model's configuration that is the language model's."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(found := config.get(name), Mapping):
            return found
    return config


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        if isinstance(value := config.get(name), int) and not isinstance(value, bool):
            return value
    return None


def _attention(config: Mapping[str, Any]) -> tuple[Attention | None, str]:
    """Return what a token leaves in the cache, or None and why that is not known."""
    text = _text_config(config)
    names = config.get("architectures") or text.get("architectures")
    if not config:
        return None, "there is no config.json"
    name = str(names[0]) if isinstance(names, list) and names else ""
    if not name.endswith(_GENERATES) or _STATEFUL.search(name) or config.get("is_encoder_decoder"):
        return None, f"{name or 'its architecture'} is not known to keep keys and values only"
    if hybrid := next((name for name in text if _HYBRID.search(name) and text[name]), None):
        return None, f"its layers keep more than keys and values ({hybrid})"
    if text.get("block_configs"):
        return None, "its layers differ from each other (block_configs)"
    layers = _number(text, "num_hidden_layers", "n_layer", "num_layers")
    heads = _number(text, "num_attention_heads", "n_head")
    if not layers or not heads:
        return None, "its configuration names neither layers nor heads"
    layers -= _number(text, "num_kv_shared_layers") or 0
    if rank := _number(text, "kv_lora_rank"):
        latent = rank + (_number(text, "qk_rope_head_dim") or 0)
        return Attention(layers, 1, 0, latent), ""
    kv_heads = _number(text, "num_key_value_heads", "num_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if text.get("multi_query") else heads
    head_dim = _number(text, "head_dim")
    if not head_dim:
        hidden = _number(text, "hidden_size", "n_embd")
        if not hidden:
            return None, "its configuration names neither head_dim nor hidden_size"
        head_dim = hidden // heads
    windowed, window = _windows(text, layers)
    if windowed is None:
        return None, "it has layers of a kind that is not known here"
    return Attention(layers, kv_heads, 2 * head_dim, 0, windowed, window), ""


def _windows(text: Mapping[str, Any], layers: int) -> tuple[int | None, int]:
    """Return how many layers look at a window only, and how wide it is; None if that is unclear."""
    window = _number(text, "sliding_window") or 0
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        kinds = kinds[:layers]
        if set(kinds) - {"full_attention", "sliding_attention"}:
            return None, 0
        return (kinds.count("sliding_attention") if window else 0), window
    if not window or text.get("use_sliding_window") is False:
        return 0, 0
    if every := _number(text, "sliding_window_pattern"):
        return layers - layers // every, window
    return (layers // 2 if text.get("model_type") == "gemma2" else layers), window
