"""How weights come into the engine: what a format needs, and what suits where the files lie.

Answers in sentences for the person who set it, before anything is downloaded or started; vLLM
itself would fail in a process of its own, after the model has come. Loads nothing.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from vllm.plugins import load_general_plugins

import model_prefetch

# By LOAD_FORMAT of vLLM 0.32: the module that it imports, and what brings it.
_PACKAGES = {
    "fastsafetensors": ("fastsafetensors", "fastsafetensors"),
    "instanttensor": ("instanttensor", "instanttensor"),
    "modelexpress": ("modelexpress", "modelexpress"),
    "runai_streamer": ("runai_model_streamer", "runai-model-streamer[s3]"),
    "runai_streamer_sharded": ("runai_model_streamer", "runai-model-streamer[s3]"),
    "tensorizer": ("tensorizer", "tensorizer"),
}


def format_fault(name: str) -> str:
    """Return what is wrong with a value of LOAD_FORMAT, "" if nothing is."""
    name = name.lower()
    module, package = _PACKAGES.get(name, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        return (
            f"{name} needs the Python package {package}, which is not installed: add "
            f"`RUN pip install '{package}'` to the Dockerfile, or unset LOAD_FORMAT"
        )
    known = _formats()
    if name not in known:
        return f"{name} is not a format of this vLLM: choose from {', '.join(sorted(known))}"
    return ""


def _formats() -> frozenset[str]:
    """Return the formats that vLLM and its plugins can load."""
    from vllm.model_executor import model_loader

    load_general_plugins()  # type: ignore[no-untyped-call]
    return frozenset(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)


def model_fault(model: str) -> str:
    """Return why a model cannot be loaded as what its name says it is, "" if nothing does."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if not model.partition("@")[0].lower().endswith(".gguf"):
        return ""
    load_general_plugins()  # type: ignore[no-untyped-call]
    if "gguf" in QUANTIZATION_METHODS:
        return ""
    return (
        f"{model} is a GGUF file, which vLLM loads with a plugin only: add "
        "`RUN pip install vllm-gguf-plugin` to the Dockerfile (it needs a GPU), or name the "
        "repository with the model's safetensors"
    )


def strategy(model: str, options: Mapping[str, str]) -> str | None:
    """Return the load strategy that suits where the model lies; None leaves it to vLLM."""
    return model_prefetch.load_strategy(Path(model), options)
