"""The pages for people: examples run, tables are the code's, links lead somewhere."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import client_config
import config
import gateway_config
import rp_handler
from local_runpod import LocalRunpod
from tests.workers import MODEL, ROOT, Caller, RunningWorker
from tools import assurance, make_docs, tiny_models

README = (ROOT / "README.md").read_text()
AGENTS = (ROOT / "AGENTS.md").read_text()
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)\n\1```$", re.DOTALL | re.MULTILINE)

NOT_RUN = (
    *("make ", "docker ", "python3 -m venv ", "export "),
    *("python client.py doctor", "python client.py serve"),
)
"""How commands begin that are not tried here: they build, publish, or stand beside such."""


def blocks(language: str) -> list[str]:
    """Return README.md's blocks of one language."""
    return [
        "\n".join(line.removeprefix(indent) for line in text.splitlines())
        for indent, found, text in BLOCK.findall(README)
        if found == language
    ]


def commands() -> Iterator[str]:
    """Yield the shell commands that can be tried here, each line one."""
    for block in blocks("sh"):
        lines = block.splitlines()
        if not any(line.startswith(NOT_RUN) for line in lines):
            yield from lines


COMMANDS = list(commands())
EXAMPLES = blocks("python")
PLAINTEXT = [line for block in blocks("json") for line in block.splitlines()]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    """A real worker that also takes plaintext."""
    tiny_models.make_tiny_llama(MODEL)
    # A model without sense would fill an object with white space until its last token.
    grammar = {"backend": "xgrammar", "disable_any_whitespace": True}
    settings: dict[str, Any] = {
        "ALLOW_PLAINTEXT": "true",
        "STRUCTURED_OUTPUTS_CONFIG": json.dumps(grammar),
    }
    with (
        LocalRunpod() as platform,
        RunningWorker(platform, tmp_path_factory.mktemp("docs"), **settings) as worker,
    ):
        yield worker.ready()


def environment(worker: RunningWorker) -> dict[str, str]:
    """Return what a reader has set before trying an example."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUNPOD_API_BASE": worker.platform.base_url,
        "RUNPOD_ENDPOINT_ID": worker.platform.endpoint_id,
        "RUNPOD_API_KEY": worker.platform.api_key,
        "ENCRYPTION_KEY": worker.key,
        "CLIENT_STATE_DIR": str(worker.folder / "state"),
    }


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 5
    assert len(COMMANDS) >= 8
    assert len(PLAINTEXT) == 3


@pytest.mark.engine
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_python_examples_run(worker: RunningWorker, example: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=ROOT,
        env=environment(worker),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout


@pytest.mark.engine
def test_the_example_of_errors_tells_the_misspelt_name(worker: RunningWorker) -> None:
    (example,) = (text for text in EXAMPLES if "temprature" in text)
    ran = subprocess.run(
        [sys.executable, "-c", example],
        cwd=ROOT,
        env=environment(worker),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert re.search(r"^400 .*temprature", ran.stdout, re.MULTILINE), ran.stdout
    answer = json.loads(ran.stdout.splitlines()[0])
    assert answer["where"] in ("east", "west")


@pytest.mark.engine
@pytest.mark.parametrize("command", COMMANDS)
def test_shell_commands_run(worker: RunningWorker, command: str) -> None:
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        env=environment(worker),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout  # a model without sense may answer with empty lines


@pytest.mark.engine
def test_the_doctor_finds_nothing(worker: RunningWorker) -> None:
    ran = subprocess.run(
        [sys.executable, "client.py", "doctor"],
        cwd=ROOT,
        env=environment(worker),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout
    assert "FAIL" not in ran.stdout


@pytest.mark.engine
@pytest.mark.parametrize("job", PLAINTEXT)
def test_plaintext_forms_are_answered_where_allowed(worker: RunningWorker, job: str) -> None:
    with Caller(worker.platform, worker.key) as caller:
        job_id = caller.submit(json.loads(job)["input"])
        assert caller.outputs(job_id)
        assert caller.status(job_id)["status"] == "COMPLETED"


def test_continuous_integration_runs_the_command_that_is_named() -> None:
    assert "make test " in "\n".join(blocks("sh"))
    assert (ROOT / ".ci" / "run").read_text().endswith("\nexec make test\n")


@pytest.mark.parametrize("page", make_docs.PAGES)
def test_made_parts_are_what_the_code_says(page: str) -> None:
    text = (ROOT / page).read_text()
    assert make_docs.made(page, text) == text, "run: .venv/bin/python tools/make_docs.py"


def test_what_was_tried_is_shown_as_it_was() -> None:
    """Also what failed: the page is made from the results, by the runs alone."""
    assert assurance.PAGE.read_text() == assurance.page(assurance.read(assurance.KEPT))


def test_a_stale_part_is_noticed() -> None:
    stale = README.replace("| `CLOCK_SKEW_S` | ", "| `CLOCK_SKEW_S` | not ")
    assert stale != README
    assert make_docs.made("README.md", stale) == README


def test_every_top_level_file_is_on_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    git("init")
    (tmp_path / "client.py").write_text('"""The client."""\n')
    (tmp_path / "LICENSE").touch()
    assert "| `client.py` | The client. |" in make_docs.files()
    (tmp_path / "novel.py").write_text('"""Unheard of."""\n')
    with pytest.raises(ValueError, match=r"novel"):
        make_docs.files()


def test_what_is_not_protected_is_on_the_first_screen() -> None:
    beginning = "\n".join(README.splitlines()[:25])
    assert "does not protect" in beginning
    assert "attestation" in beginning


@pytest.mark.parametrize(
    "page", ["README.md", "AGENTS.md", "CHANGELOG.md", "SECURITY.md", "SPEC.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            content = (ROOT / path).read_text() if path else text
            heads = re.findall(r"^#+ (.+)$", content, re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, target


@pytest.mark.parametrize("page", [README, AGENTS], ids=["README.md", "AGENTS.md"])
def test_files_and_targets_that_are_named_exist(page: str) -> None:
    named = re.findall(r"`((?:tests|tools|requirements|vectors)/[\w./*-]*|\w+\.py)`", page)
    for name in named:
        found = any(
            list(ROOT.glob(name.rstrip("/"))) for name in (name, f"tests/{name}", f"tools/{name}")
        )
        assert found, name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", page, re.MULTILINE):
        assert target in targets, target


@pytest.mark.engine
def test_variables_that_are_named_exist() -> None:
    # In a process of its own: vLLM warns when it is imported.
    code = "from engine_options import EngineOptions; print(*EngineOptions().names())"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    settings = {
        setting.name
        for setting in (*config.SETTINGS, *client_config.SETTINGS, *gateway_config.SETTINGS)
    }
    others = {
        "CAP_SYS_PTRACE",
        "IN_PROGRESS",
        "IN_QUEUE",
        "MODEL_REVISION",
        "PIP_INDEX_URL",
        "RUN_AS",
        "TIMED_OUT",
        "RUNPOD_INIT_TIMEOUT",
        "RUNPOD_SECRET_encryption_key",
        "RUNPOD_SECRET_hf_token",
        "RUNPOD_SECRET_hpke_private_key",
        "SYS_PTRACE",
        "YOUR_ADDRESS",
        "YOUR_NAME",
        "TOOL_LIMIT_S",
        "VLLM_CPU_OMP_THREADS_BIND",
        "XDG_STATE_HOME",
    }
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Za-z]+)+\b", README))
    assert named <= settings | others | set(ran.stdout.split())


def test_the_worker_tells_the_version_of_the_package() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert package == rp_handler.VERSION
    assert f"## {package}" in (ROOT / "CHANGELOG.md").read_text()
