"""Which files of a model the engine needs, and whether they are whole.

Judges by names, sizes, headers and indexes; never reads weights and never touches the network.
"""

import fnmatch
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

# What an engine reads besides weights, and what it never reads although the name fits.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.tiktoken", "*.py")
SKIPPED = ("original/*", "onnx/*", "*.onnx*", "*.h5", "*.msgpack", ".*")
TRAINING_STATE = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*")
TOKENIZERS = ("tokenizer*", "vocab.*", "tekken.json", "*.tiktoken", "spiece.model")
CONFIGS = ("config.json", "params.json", "adapter_config.json")


def select_files(files: Iterable[str], gguf: str | None = None) -> list[str]:
    """Return those of a model's files that the engine needs, sorted.

    Weights are safetensors where there are any, else `.bin`, else `.pt`; `consolidated*` only
    where nothing else holds the weights; GGUF only where `gguf` names the file.
    """
    rest = [f for f in files if not matches(f, SKIPPED)]
    side = {f for f in rest if matches(f, SIDE_FILES)}
    return sorted(side | set(weights(rest, gguf)))


def weights(files: Sequence[str], gguf: str | None) -> list[str]:
    """Return the files that hold the weights: the best kind of those there are."""
    if gguf is not None:
        return [f for f in files if f == gguf]
    usable = [f for f in files if not matches(f, (*SKIPPED, *TRAINING_STATE))]
    for suffix in (".safetensors", ".bin", ".pt"):
        fitting = [f for f in usable if f.endswith(suffix)]
        plain = [f for f in fitting if not Path(f).name.startswith("consolidated")]
        if fitting:
            return plain or fitting
    return []


def loaded(files: Sequence[str], gguf: str | None = None) -> list[str]:
    """Return the files of weights that vLLM loads: it looks into no folder but the model's own.

    In others there may be checkpoints of the same model, or what holds all of its weights.
    """
    own = [file for file in files if "/" not in file]
    return weights(own, gguf) or weights(files, gguf)


def matches(file: str, patterns: Iterable[str]) -> bool:
    """Whether a file name fits one of the patterns; `*` also crosses folders, as on the Hub."""
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def check(
    folder: Path, sizes: Mapping[str, int] | None = None, gguf: str | None = None
) -> dict[str, str]:
    """Return what is wrong with a model's files, as file → reason; empty means complete.

    `sizes` are the sizes in bytes that the Hub gives for the needed files. Without them the files
    are judged by themselves: shards named by an index, the length in a safetensors header.
    Reads headers and indexes only, never the weights.
    """
    if sizes is not None:
        faults = {
            file: reason
            for file, size in sizes.items()
            if (reason := _size_fault(folder / file, size))
        }
        return faults or _absences(sizes, gguf)
    files = listing(folder)
    needed = select_files(files, gguf)
    faults = {file: reason for file in needed if (reason := _file_fault(folder / file))}
    for index in (f for f in needed if f.endswith(".index.json") and f not in faults):
        # An index of weights that were passed over (.bin beside safetensors) binds nobody.
        shards = _shards(folder, index)
        if shards & set(weights([*files, *shards], gguf)):
            faults |= {shard: "missing" for shard in shards - set(files)}
    return faults or _absences(needed, gguf)


def _absences(files: Iterable[str], gguf: str | None) -> dict[str, str]:
    files = list(files)
    faults = {}
    if not weights(files, gguf):
        faults[gguf or "weights (.safetensors, .bin or .pt)"] = "missing"
    if gguf is None and not any(config in files for config in CONFIGS):
        faults["config.json"] = "missing"
    return faults


def listing(folder: Path) -> list[str]:
    """Return every file below `folder` as a relative name, dangling links included."""
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [(Path(parent) / file).relative_to(folder).as_posix() for file in files]
    return sorted(names)


def size_of(path: Path) -> int | None:
    """Return a file's size in bytes, links followed; None where there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def check_file(path: Path) -> dict[str, str]:
    """Return what is wrong with a single file, in the form of `check`."""
    return {path.name: reason} if (reason := _file_fault(path)) else {}


def _size_fault(path: Path, size: int) -> str | None:
    found = size_of(path)
    if found is None:
        return "dangling link" if path.is_symlink() else "missing"
    return None if found == size else f"{found} of {size} bytes"


def _file_fault(path: Path) -> str | None:
    size = size_of(path)
    if size is None:
        return "dangling link" if path.is_symlink() else "missing"
    name = path.name
    if size == 0 and not name.endswith((".py", ".txt")):
        return "empty"
    try:
        with path.open("rb") as file:
            start = file.read(40)
            file.seek(max(0, size - 64))
            end = file.read().rstrip()[-1:]
        if start.startswith(b"version https://git-lfs.github.com"):
            return "a Git LFS pointer (run `git lfs pull`)"
        if name.endswith(".safetensors"):
            return _safetensors_fault(path, size)
        if name.endswith(".gguf") and not start.startswith(b"GGUF"):
            return "not a GGUF file"
        if name.endswith((".bin", ".pt")) and start.startswith(b"PK\x03\x04"):
            return None if zipfile.is_zipfile(path) else "truncated"
        if name.endswith(".json"):
            if name in CONFIGS or name.endswith(".index.json"):
                json.loads(path.read_bytes())
            elif end not in (b"}", b"]"):
                return "truncated"
    except ValueError:
        return "not JSON"
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return None


def _safetensors_fault(path: Path, size: int) -> str | None:
    """Format: 8 bytes little-endian header length, JSON header, data (safetensors 0.4 to 0.8)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            return f"truncated at {size} bytes"
        try:
            header = json.loads(file.read(length))
            ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "not a safetensors file"
    return None if size == expected else f"{size} of {expected} bytes"


def _shards(folder: Path, index: str) -> set[str]:
    """Return the shards that an index names, relative to the model's folder like the index."""
    content = json.loads((folder / index).read_bytes())
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return {(Path(index).parent / name).as_posix() for name in names if isinstance(name, str)}


def human_size(size_bytes: float) -> str:
    """Write a size for people, in decimal units as volumes are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} bytes"


def listed(faults: Mapping[str, str]) -> str:
    """Write the result of `check` for people; five files are enough to see what is wrong."""
    shown = [f"{file}: {reason}" for file, reason in list(faults.items())[:5]]
    more = [f"and {len(faults) - 5} more"] if len(faults) > 5 else []
    return ", ".join(shown + more)
