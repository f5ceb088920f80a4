"""What an image that is pushed tells whoever pulls it."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.claims import Trials
from tests.image.layers import Image, exported, found
from tools import buildah
from tools.image_build import SECRETS

LEFT_BY_A_BUILD = re.compile(
    # Caches of uv, pip and apt, wheels, what was mounted, a repository's own files, keys.
    r"root/\.cache/.|root/\.config/.|var/cache/apt/.*\.(deb|bin)$|var/lib/apt/lists/.*_"
    # Debian's own wheels are what its `python3 -m venv` installs.
    r"|(?!usr/share/python-wheels/).*\.whl$"
    r"|(tmp|var/tmp|mnt|run/secrets)/.|worker/(\.git|tests|models/.*/\.cache)/|.*\.key$|.*\.env$"
)

WEAKENED = """
FROM {base}
RUN --mount=type=secret,id=hf_token cp /run/secrets/hf_token /tmp/token
RUN rm /tmp/token
"""


@pytest.fixture(scope="module")
def layers(image: str) -> Iterator[Image]:
    with exported(image) as layers:
        yield layers


@pytest.mark.claim("image.secrets")
def test_an_image_that_keeps_a_secret_is_caught(image: str, tmp_path: Path) -> None:
    """The search below can fail, even where a later layer removes the file again."""
    (tmp_path / "Dockerfile").write_text(WEAKENED.format(base=buildah.BASE))
    (tmp_path / "token").write_text(SECRETS["hf_token"])
    name = "localhost/sealed-vllm:weakened"
    options = ["--isolation=chroot", "--layers", "--pull=never", f"--tag={name}"]
    subprocess.run(
        buildah.command(
            "build", *options, f"--secret=id=hf_token,src={tmp_path / 'token'}", tmp_path
        ),
        env=buildah.environment(),
        check=True,
        capture_output=True,
    )
    try:
        with exported(name) as weakened:
            hits = [found(SECRETS.values(), layer) for layer in weakened.layers]
            left = [path for layer in weakened.layers for path in layer.files]
    finally:
        buildah.output("rmi", name)
    assert {SECRETS["hf_token"]} in hits
    assert "tmp/token" in filter(LEFT_BY_A_BUILD.match, left)


@pytest.mark.claim(
    "image.secrets",
    "No layer of the image, and no setting in it, holds a secret that its build was given.",
)
def test_no_layer_and_no_setting_holds_a_secret_of_the_build(layers: Image, claim: Trials) -> None:
    for layer in layers.layers:
        claim.trial(not found(SECRETS.values(), layer))
    claim.trial(not any(word.encode() in layers.configuration for word in SECRETS.values()))
    claim.detail(f"{len(layers.layers)} layers, {size_bytes(layers) / 1e9:.1f} GB searched")


@pytest.mark.claim(
    "image.leftovers",
    "No layer of the image holds what only its build needed: caches, packages, the repository.",
)
def test_no_layer_holds_what_only_the_build_needed(
    layers: Image, claim: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\n\n{buildah.IMAGE}: {size_bytes(layers) / 1e6:,.0f} MB uncompressed")
        for layer in layers.layers:
            made_by = " ".join(layer.made_by.removeprefix("/bin/sh -c #(nop)").split())
            print(f"{layer.size_bytes / 1e6:9,.1f} MB  {made_by:.88}")
    claim.detail(f"{size_bytes(layers) / 1e6:,.0f} MB uncompressed")
    left = [path for layer in layers.layers for path in layer.files if LEFT_BY_A_BUILD.match(path)]
    assert left == []


@pytest.mark.claim("image.leftovers")
def test_the_worker_has_its_modules_and_nothing_of_the_local_platform(layers: Image) -> None:
    own = {path for layer in layers.layers for path in layer.files if path.startswith("worker/")}
    assert {"worker/rp_handler.py", "worker/LICENSE", "worker/models/org/tiny/config.json"} <= own
    assert not [path for path in own if "local_runpod" in path or "/tools/image" in path]


def size_bytes(layers: Image) -> int:
    return sum(layer.size_bytes for layer in layers.layers)
