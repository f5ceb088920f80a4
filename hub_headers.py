"""A model's shape from the Hub: its configuration and the heads of its weights, a few kB each.

Keeps nothing: what stands in the cache of the Hub stays what a download put there. Which model is
meant, and what people are told of a failure, is decided elsewhere.
"""

import logging
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import model_shape
from errors import ModelError
from hub_download import Failure, Hub, diagnose
from model_cache import HUB, Repo
from model_files import loaded
from model_shape import Shape

_THREADS = 8
_ANSWER_S = 15.0


def read(repo: Repo, hub: Hub) -> tuple[Shape | None, Failure | None]:
    """Return the shape of a revision's weights, or why it cannot be had; of GGUF the size only."""
    try:
        return _read(repo, hub), None
    except ModelError:
        raise  # what is there cannot be read
    except Exception as error:
        return None, Failure(**diagnose(error, hub.endpoint or HUB))


def _read(repo: Repo, hub: Hub) -> Shape:
    from huggingface_hub import HfApi, RepoFile, constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # hides a blocking call to the public Hub
    # Each of its retries would be told twice, by its handler and by the caller's.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    api = HfApi(endpoint=hub.endpoint, token=hub.token or False)
    # First the one call that the library does not repeat for half a minute where nobody answers.
    api.model_info(repo.id, revision=repo.revision, timeout=_ANSWER_S)
    tree = api.list_repo_tree(repo.id, revision=repo.revision, recursive=True)
    all_sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    sizes = {name: all_sizes[name] for name in loaded(list(all_sizes), repo.file)}

    def header(name: str) -> Mapping[str, Any]:
        found = api.parse_safetensors_file_metadata(repo.id, name, revision=repo.revision)
        return {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in found.tensors.items()
        }

    def content(name: str) -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = api.hf_hub_download(repo.id, name, revision=repo.revision, local_dir=folder)
            where = f"{name} of {repo.id} on the Hub"
            return model_shape.parsed(Path(path).read_bytes(), where, "try another revision")

    if repo.file is not None:
        return Shape(sum(sizes.values()), unknown="a GGUF file's own header is not read")
    if model_shape.is_adapter(list(all_sizes)):
        return model_shape.of_adapter(content(model_shape.ADAPTER_CONFIG), sizes)
    config = content("config.json") if "config.json" in all_sizes else {}
    shards = [name for name in sizes if name.endswith(".safetensors")]
    with ThreadPoolExecutor(_THREADS) as pool:
        headers = dict(zip(shards, pool.map(header, shards), strict=True))
    return model_shape.of_parts(config, sizes, headers)
