"""Whether this worker is fit to serve, in checks that the SDK runs before it takes jobs.

Owns what is checked before there is an event loop: the keys, the models' files, the engine's
process. That the engine answers can be seen inside the loop only and is part of its start. Knows
nothing of the SDK.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from crypto import RequestOpener, new_request, seal_request
from errors import ConfigError, EngineDead, ModelIncomplete, SealedError
from keys import Key, KeyRing

Check = Callable[[], None]

_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".jinja")


def checks(
    keys: KeyRing, endpoint_id: str, files: Mapping[Path, int], dead: Callable[[], bool]
) -> list[Check]:
    """Return the checks; each raises an error whose text may be shown where it fails.

    `files` are the models' files with their sizes when they were made ready.
    """

    # The platform is told the name of the function that failed.
    def key() -> None:
        _check_keys(keys, endpoint_id)

    def model_files() -> None:
        _check_files(files)

    def engine_process() -> None:
        if dead():
            raise EngineDead

    return [key, model_files, engine_process]


def files_of(models: Iterable[Path]) -> dict[Path, int]:
    """Return every file of these models, folders or single files, with its size."""
    return {
        path: path.stat().st_size
        for model in models
        for path in ([model] if model.is_file() else model.iterdir())
        if path.suffix in _SUFFIXES and path.is_file()
    }


def _check_keys(keys: Iterable[Key], endpoint_id: str) -> None:
    """Have a request sealed and opened with the keys that are good now; one that works is enough.

    Where all become good later there is nothing to try yet.
    """
    faults = []
    for key in (key for key in keys if key.terms.good_at(time.time())):
        request = new_request("worker", None, audience=endpoint_id, ttl_s=60, method="GET")
        opener = RequestOpener(KeyRing([key]), endpoint_id, max_ttl_s=60)
        try:
            if opener.open(seal_request(request, key)).request == request:
                return
            fault = "opens something else than it has sealed"
        except SealedError as error:
            fault = f"does not open what it has sealed: {type(error).__name__}"
        faults.append(f"the key {key.id} {fault}")
    if faults:
        raise ConfigError(faults)


def _check_files(files: Mapping[Path, int]) -> None:
    for path, size in files.items():
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise ModelIncomplete(
                f"{path} has {found} bytes, and had {size} when the model was made ready: "
                "something else changes the volume"
            )
