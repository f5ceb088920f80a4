"""LoRA adapters for tests, made of random weights: whole ones and broken ones."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine_adapters import CONFIG, WEIGHTS
from tools import tiny_models

HIDDEN = tiny_models.SHAPE["hidden_size"]
LAYERS = tiny_models.SHAPE["num_hidden_layers"]
MODULES = ("self_attn.q_proj", "self_attn.o_proj")


def make_adapter(
    folder: Path,
    *,
    rank: int = 4,
    seed: int = 0,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    modules: tuple[str, ...] = MODULES,
    **config: Any,
) -> Path:
    """Make an adapter of tiny-llama that changes its every answer; `config` goes over PEFT's."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(layers):
        for module in modules:
            name = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(rank, hidden, generator=random)
            weights[f"{name}.lora_B.weight"] = torch.randn(hidden, rank, generator=random)
    save_file(weights, folder / WEIGHTS)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny-llama",
        "r": rank,
        "lora_alpha": 8 * rank,
        "target_modules": [module.rpartition(".")[2] for module in modules],
        "bias": "none",
        **config,
    }
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder
