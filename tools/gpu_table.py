"""What README.md says of GPUs: well-known models planned for the GPUs that one can rent.

The shapes are those of the models' published configurations; nothing is asked of the network.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model_plan
import model_shape
from machine_memory import Memory
from model_fit import estimate
from model_needs import FitSettings
from model_shape import Shape

GIB = 2**30
REQUEST_TOKENS = 4096

# Layers, hidden, intermediate, heads, heads of keys and values, vocabulary, longest sequence.
MODELS = {
    "Qwen/Qwen3-4B": (36, 2560, 9728, 32, 8, 151936, 40960),
    "Qwen/Qwen3-8B": (36, 4096, 12288, 32, 8, 151936, 40960),
    "Qwen/Qwen3-32B": (64, 5120, 25600, 64, 8, 151936, 40960),
    "meta-llama/Llama-3.3-70B-Instruct": (80, 8192, 28672, 64, 8, 128256, 131072),
}
_TIED = ("Qwen/Qwen3-4B",)
_HEAD_DIM = 128
GPUS = ((24, 1), (48, 1), (80, 1), (80, 2), (80, 4))


def shape(name: str) -> Shape:
    """Return the shape of one of MODELS in bfloat16."""
    layers, hidden, inner, heads, kv_heads, vocabulary, longest = MODELS[name]
    config: Mapping[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": _HEAD_DIM,
        "vocab_size": vocabulary,
        "max_position_embeddings": longest,
        "dtype": "bfloat16",
        "tie_word_embeddings": name in _TIED,
    }
    q, kv = heads * _HEAD_DIM, kv_heads * _HEAD_DIM
    matrices = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q)) + 3 * ((inner, hidden),)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    if name not in _TIED:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        for number, dims in enumerate(matrices):
            shapes[f"model.layers.{layer}.{number}.weight"] = dims
    header = {
        tensor: {"dtype": "BF16", "shape": dims, "data_offsets": (0, 2 * math.prod(dims))}
        for tensor, dims in shapes.items()
    }
    size = sum(2 * math.prod(dims) for dims in shapes.values())
    return model_shape.of_parts(config, {"model.safetensors": size}, {"model.safetensors": header})


def rows() -> Iterator[tuple[str, ...]]:
    """Yield, for each model and precision, what each kind of worker holds at once."""
    for name in MODELS:
        for quantization, precision in (("", "bfloat16"), ("fp8", "`QUANTIZATION=fp8`")):
            yield (
                f"`{name}`",
                precision,
                *(_cell(shape(name), quantization, gib, count) for gib, count in GPUS),
            )


def _cell(model: Shape, quantization: str, gib: int, count: int) -> str:
    memory = Memory("gpu", "the GPU", count, gib * GIB, gib * GIB)
    settings = FitSettings(
        max_model_len=REQUEST_TOKENS, tensor_parallel_size=count, quantization=quantization
    )
    found = estimate(model, settings, memory)
    return str(found.at_once(REQUEST_TOKENS)) if found.verdict == "fits" else "no"


def heads() -> tuple[str, ...]:
    """Return the heads of the table's columns."""
    return ("model", "weights", *(f"{f'{n} x ' if n > 1 else ''}{gib} GB" for gib, n in GPUS))


def example() -> str:
    """Return what `utils.py plan` prints of a model that does not quite fit."""
    name, memory = "Qwen/Qwen3-8B", Memory("gpu", "the GPU", 1, 24 * GIB, 24 * GIB)
    printed = model_plan.lines(name, estimate(shape(name), FitSettings(), memory), memory)
    return "\n".join(
        ("```console", f"$ python utils.py plan {name} --gpu-memory 24GB", *printed, "```")
    )
