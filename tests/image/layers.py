"""The layers of an image, file by file, those that a later layer hides included."""

import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tools import buildah

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Layer:
    """One layer: the instruction that made it, and its files as a tar archive."""

    made_by: str
    archive: Path

    @cached_property
    def files(self) -> list[str]:
        """The paths of what it adds, folders left out."""
        with tarfile.open(self.archive) as archive:
            return [member.name for member in archive if not member.isdir()]

    @property
    def size_bytes(self) -> int:
        """How much it adds to the image, uncompressed."""
        return self.archive.stat().st_size


@dataclass(frozen=True)
class Image:
    """An image as a registry would hold it."""

    layers: list[Layer]
    configuration: bytes
    """Names every instruction and every variable; a registry shows it to whoever pulls."""


@contextmanager
def exported(name: str) -> Iterator[Image]:
    """Write the image's layers beside buildah's storage, and remove them afterwards."""
    folder = buildah.FOLDER / "layers"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        buildah.output("push", "--quiet", "--disable-compression", name, f"dir:{folder}")
        manifest = json.loads((folder / "manifest.json").read_text())
        configuration = _blob(folder, manifest["config"]).read_bytes()
        history = json.loads(configuration)["history"]
        made = [step["created_by"] for step in history if not step.get("empty_layer")]
        archives = [_blob(folder, layer) for layer in manifest["layers"]]
        yield Image([Layer(*each) for each in zip(made, archives, strict=True)], configuration)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _blob(folder: Path, described: dict[str, str]) -> Path:
    return folder / described["digest"].removeprefix("sha256:")


def found(words: Iterable[str], layer: Layer) -> set[str]:
    """Return which of the words stand anywhere in the layer, names of files included."""
    wanted = {word.encode(): word for word in words}
    overlap = max(map(len, wanted)) - 1
    seen: set[str] = set()
    before = b""
    with layer.archive.open("rb") as archive:
        while piece := archive.read(_PIECE_BYTES):
            window = before + piece
            seen |= {word for bytes_, word in wanted.items() if bytes_ in window}
            before = window[-overlap:]
    return seen
