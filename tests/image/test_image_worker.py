"""The image as RunPod would start it, but for the GPU: a sealed request in, its answer out."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from keys import generate_key
from local_runpod import LocalRunpod
from tests.image.containers import CACHES, Container, running
from tests.wait import until
from tests.workers import ROOT
from tools import buildah

KEY = generate_key()
PROMPT = "Where is the quarterly report of the lighthouse?"
ANSWER = "In the lamp room, second shelf."


@pytest.fixture(scope="module")
def platform() -> Iterator[LocalRunpod]:
    with LocalRunpod(record_bytes=10_000_000) as platform:
        yield platform


@pytest.fixture(scope="module")
def container(
    platform: LocalRunpod, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    """A worker that is told its key; the model is in the image."""
    settings = {
        "ENCRYPTION_KEY": KEY,
        # For a small machine.
        "ENFORCE_EAGER": "true",
        "MAX_MODEL_LEN": "512",
        "KV_CACHE_MEMORY_BYTES": "67108864",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with running(platform, image, tmp_path_factory.mktemp("container"), **settings) as container:
        container.wait_until_ready()
        yield container


@pytest.mark.claim(
    "image.answers", "The image, built from the Dockerfile, answers a sealed request of client.py."
)
def test_one_sealed_request_is_answered(container: Container, platform: LocalRunpod) -> None:
    asked = subprocess.run(
        [
            sys.executable,
            str(ROOT / "client.py"),
            PROMPT,
            "-o",
            "structured_outputs",
            json.dumps({"choice": [ANSWER]}),
        ],
        env={
            **os.environ,
            "RUNPOD_API_BASE": platform.base_url,
            "RUNPOD_ENDPOINT_ID": platform.endpoint_id,
            "RUNPOD_API_KEY": platform.api_key,
            "ENCRYPTION_KEY": KEY,
        },
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0, asked.stderr + container.log[-4000:]
    assert asked.stdout.strip() == ANSWER
    carried = b"".join(each.body for each in platform.exchanged)
    assert carried
    assert not [word for word in (PROMPT, ANSWER) if word.encode() in carried]
    assert not [word for word in (PROMPT, ANSWER) if word in container.log]


@pytest.mark.claim(
    "image.model", "A model that is put into the image starts with no network and no volume."
)
def test_the_model_came_from_the_image(container: Container) -> None:
    """The network has no way out, and the volume holds no model."""
    assert f"/worker/models/{buildah.MODEL}" in container.log
    assert not list(container.volume.rglob("*.safetensors"))


@pytest.mark.claim(
    "image.readonly", "The worker runs where it can write nothing but its caches and the volume."
)
def test_only_its_caches_can_be_written(container: Container) -> None:
    for place in ("/", "/worker", "/opt/venv", "/root", "/etc", "/usr", "/var"):
        refused = container.inside("touch", f"{place}/written")
        assert "Read-only file system" in refused.stderr, place
    for place in (*CACHES, "/runpod-volume"):
        assert container.inside("touch", f"{place}/written").returncode == 0, place


@pytest.mark.claim(
    "image.sigterm", "On SIGTERM the container ends with 0, and none of its processes is left."
)
def test_sigterm_ends_it_with_0_and_leaves_no_process(
    container: Container, platform: LocalRunpod
) -> None:
    """The last test: it ends the worker. PID 1 ignores a signal that it does not handle."""
    before = container.processes()
    assert len(before) > 1, "the engine has processes of its own"
    assert not [process for process in before if process.status() == psutil.STATUS_ZOMBIE]
    platform.drain("pod-1")
    psutil.Process(container.pid).terminate()
    assert container.process.wait(timeout=60) == 0, container.log[-4000:]
    until(lambda: not any(process.is_running() for process in before), 5, "no process is left")
