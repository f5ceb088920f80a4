"""buildah with a storage of this project's own, so that nothing of a person's images is touched.

Owns where that lies and how buildah is called. Knows neither the Dockerfile nor the worker.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "image"
BASE = "localhost/debian:bookworm"
IMAGE = "localhost/sealed-vllm:cpu"
MODEL = "org/tiny"
"""The name under which tiny-llama is put into the image."""


def command(*args: str | Path) -> list[str]:
    """Return the command line for `buildah ARGS`."""
    storage = ["--root", str(FOLDER / "storage"), "--runroot", str(FOLDER / "run")]
    return ["buildah", *storage, *map(str, args)]


def environment() -> dict[str, str]:
    """Return what buildah has to be started with."""
    # It keeps the caches of a build there, and whole layers while it writes them.
    return {"STORAGE_DRIVER": "overlay", **os.environ, "TMPDIR": str(FOLDER / "tmp")}


def output(*args: str | Path) -> str:
    """Return what `buildah ARGS` prints; CalledProcessError where it fails."""
    done = subprocess.run(
        command(*args), env=environment(), check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def exists(image: str) -> bool:
    """Whether the storage has the image."""
    return image in output("images", "--format", "{{.Name}}:{{.Tag}}").splitlines()


def configuration(image: str) -> dict[str, Any]:
    """Return the image's configuration as the OCI's standard writes it."""
    loaded: dict[str, Any] = json.loads(output("inspect", "--type", "image", image))
    return dict(loaded["OCIv1"])
