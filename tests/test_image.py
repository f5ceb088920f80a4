"""What the image's build runs, where it can be run without building one: tests/image does that."""

import os
import re
import subprocess
import sys
from pathlib import Path

import utils
from tests.hub import Hub
from tests.test_utils import MODEL, NEEDED

ROOT = Path(__file__).resolve().parent.parent


def test_the_image_is_built_on_the_vllm_that_the_tests_run_with() -> None:
    base = re.search(r"^ARG BASE=vllm/vllm-openai:v(.+)$", (ROOT / "Dockerfile").read_text(), re.M)
    cpu = (ROOT / "requirements" / "engine-cpu.txt").read_text()
    assert base and f"\nvllm-cpu=={base[1]}\n" in cpu


def test_a_model_baked_into_the_image_needs_no_network(tmp_path: Path) -> None:
    with Hub().serving() as hub:
        sha = hub.add("org/tiny", MODEL)
        baked = subprocess.run(
            [str(ROOT / "tools" / "bake_model.sh"), f"org/tiny@{sha}", str(tmp_path / "models")],
            env={
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
        )
    assert baked.returncode == 0, baked.stderr
    snapshot = utils.resolve(
        "org/tiny",
        hub_cache=tmp_path / "no-volume",
        runpod_cache=tmp_path / "no-cache",
        model_dirs=[tmp_path / "models"],
        endpoint=hub.url,  # nobody listens there any more
    )
    assert snapshot.source == "MODEL_DIRS"
    files = [path for path in snapshot.path.rglob("*") if not path.is_dir()]
    assert sorted(str(path.relative_to(snapshot.path)) for path in files) == NEEDED
    assert not any(path.is_symlink() for path in files)


def test_what_cannot_be_fetched_fails_the_build(tmp_path: Path) -> None:
    with Hub().serving() as hub:
        done = subprocess.run(
            [str(ROOT / "tools" / "bake_model.sh"), "org/none", str(tmp_path / "models")],
            env={
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
        )
    assert done.returncode != 0
    assert "there is no model org/none" in done.stderr
    assert not (tmp_path / "models" / "org").exists()
