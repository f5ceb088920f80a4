"""Writes what is made from the code: settings, exit codes, help and files in README.md, the
promises in SECURITY.md.

A part stands between `<!-- made: NAME -->` and `<!-- end -->`. `--check` writes nothing and
fails where a part is not what the code says.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import client_config
import commands_parser
import config
import gateway_config
from tools import assurance, gpu_table

ROOT = Path(__file__).resolve().parent.parent

GROUPS = {
    "The worker": (
        "rp_handler",
        "boot",
        "preparation",
        "readiness",
        "readiness_report",
        "engine_phases",
        "model_swap",
        "base_models",
        "job_loop",
        "fitness",
        "request_bounds",
        "process_hygiene",
        "failed_starts",
        "replies",
        "pacing",
        "config",
        "worker_environment",
        "log_guard",
        "engine",
        "engine_adapters",
        "engine_forms",
        "engine_options",
        "engine_loading",
        "engine_render",
        "engine_run",
        "engine_sampling",
        "engine_tasks",
        "engine_tracking",
        "engine_watchdog",
        "chat",
        "simple_form",
        "replay_guard",
        "request_attempt",
        "replay_store",
        "client_limits",
        "asgi",
        "utils",
        "model_commands",
        "model_places",
        "model_cache",
        "model_files",
        "model_hashes",
        "model_download",
        "model_lease",
        "model_janitor",
        "model_progress",
        "model_failures",
        "hub_download",
        "compile_cache",
        "compile_archive",
        "compile_key",
        "hub_headers",
        "model_shape",
        "model_needs",
        "model_fit",
        "model_plan",
        "machine_memory",
        "model_prefetch",
    ),
    "Both sides": (
        "protocol",
        "frames",
        "crypto",
        "keys",
        "key_terms",
        "hpke",
        "fernets",
        "errors",
    ),
    "The client": (
        "client",
        "calls",
        "commands",
        "commands_parser",
        "commands_ask",
        "commands_jobs",
        "commands_screen",
        "commands_interrupts",
        "doctor",
        "streams",
        "answers",
        "job",
        "progress",
        "job_polled",
        "job_route",
        "submissions",
        "pickup",
        "job_records",
        "delivery",
        "endpoint",
        "transport",
        "client_config",
    ),
    "The gateway": (
        "gateway",
        "gateway_config",
        "gateway_guard",
        "gateway_relay",
        "gateway_reply",
        "gateway_body",
        "gateway_forms",
        "gateway_errors",
        "gateway_models",
        "gateway_metrics",
        "gateway_page",
        "gateway_api",
        "gateway_admin",
        "gateway_vapi",
        "gateway_voice",
    ),
    "The local platform": (
        "local_runpod",
        "local_runpod_http",
        "local_runpod_queue",
        "local_runpod_workers",
        "local_runpod_faults",
    ),
}

OTHERS = {
    "SPEC.md": "The wire protocol, complete: write a client in another language from it.",
    "vectors": "Examples of every rule of SPEC.md, to test such a client with.",
    "README.md": "This page.",
    "SECURITY.md": "What is promised and what is not, how that is tried, how to report.",
    "AGENTS.md": "For whoever changes the code, human or tool: commands, imports, conventions.",
    "CHANGELOG.md": "What changed, by version.",
    "LICENSE": "Apache-2.0.",
    "Makefile": "The commands; `make help` lists them.",
    "Dockerfile": "The worker's image.",
    ".dockerignore": "What the image does not need.",
    ".runpod": "How RunPod's hub presents and tries the worker.",
    ".ci": "What continuous integration runs.",
    ".gitignore": "What is made and not kept.",
    "pyproject.toml": "The client's package, and the settings of lint, types and tests.",
    "requirements": "What is installed where, in which version, and why.",
    "vllm_logging.json": "vLLM's logging, with the content filter of `log_guard.py`.",
    "page": "The gateway's status page, served by `gateway_page.py`.",
    "docs": "Longer guides, and pictures.",
    "examples": "Files to copy: a voice file for the Vapi webhook.",
    "tests": "The tests; each file says what it holds.",
    "tools": "Scripts behind the commands.",
}


def worker_settings() -> str:
    """Return the table of the worker's settings."""
    rows = ((f"`{each.name}`", each.default, each.meaning) for each in config.SETTINGS)
    return table(("variable", "default", "meaning"), rows)


def client_settings() -> str:
    """Return the table of the client's settings."""
    rows = ((f"`{each.name}`", each.default, each.meaning) for each in client_config.SETTINGS)
    return table(("variable", "default", "meaning"), rows)


def gateway_settings() -> str:
    """Return the table of the gateway's settings."""
    rows = ((f"`{each.name}`", each.default, each.meaning) for each in gateway_config.SETTINGS)
    return table(("variable", "default", "meaning"), rows)


def exit_codes() -> str:
    """Return the table of exit codes, from the command's own help."""
    lines = commands_parser.exit_codes().splitlines()[1:]
    return table(("code", "meaning"), (line.split(maxsplit=1) for line in lines))


def client_help() -> str:
    """Return the command's help without the exit codes, and the options of its default."""
    printed = subprocess.run(
        [sys.executable, "client.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    text = printed.partition("exit codes:")[0].rstrip()
    # A table, because Python's versions lay out the help of options differently.
    rows = []
    for action in commands_parser.subparsers(commands_parser.build_parser())["ask"]._actions:
        names = ", ".join(action.option_strings)
        value = action.metavar or ""
        given = " ".join(value) if isinstance(value, tuple) else value
        if names and action.dest != "help":
            rows.append((f"`{names}{' ' if given else ''}{given}`", action.help or ""))
    options = table(("option of a prompt", "meaning"), rows)
    return f"```console\n$ python client.py --help\n{text}\n```\n\n{options}"


def volume_help() -> str:
    """Return the help of the model cache's command."""
    printed = subprocess.run(
        [sys.executable, "utils.py", "--help"],
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "COLUMNS": "100",
            "HF_HOME": "/workspace/huggingface-cache",
        },
        check=True,
        capture_output=True,
        text=True,
    ).stdout.rstrip()
    return f"```console\n$ python utils.py --help\n{printed}\n```"


def make_help() -> str:
    """Return what `make help` prints."""
    printed = subprocess.run(
        ["make", "--silent", "--no-print-directory", "help"],  # noqa: S607 - the person's own make
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.rstrip()
    return f"```console\n$ make help\n{printed}\n```"


def files() -> str:
    """Return the map of the top-level files; ValueError names one that it lacks."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    present = {name.partition("/")[0] for name in listed if (ROOT / name).exists()}
    modules = {name.removesuffix(".py") for name in present if name.endswith(".py")}
    known = {module for group in GROUPS.values() for module in group}
    if lacking := (modules - known) | (present - OTHERS.keys() - {f"{m}.py" for m in modules}):
        raise ValueError(f"tools/make_docs.py has no group or line for {sorted(lacking)}")
    parts = []
    for title, group in GROUPS.items():
        rows = [(f"`{name}.py`", summary(name)) for name in group if name in modules]
        parts.append(f"**{title}**\n\n{table(('file', 'what it is'), rows)}")
    rows = [(f"`{name}`", line) for name, line in OTHERS.items() if name in present]
    parts.append(f"**The rest**\n\n{table(('file', 'what it is'), rows)}")
    return "\n\n".join(parts)


def summary(module: str) -> str:
    """Return the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def gpus() -> str:
    """Return how many requests well-known models hold at once on the GPUs that one can rent."""
    return table(gpu_table.heads(), gpu_table.rows())


def promises() -> str:
    """Return the table of what the suites try, from the tests' own marks."""
    found = {claim.id: claim.status for claim in assurance.read(assurance.KEPT)}
    rows = []
    for id, claim in assurance.declared().items():
        files = ", ".join(f"`{file}`" for file in claim.files)
        status = found.get(id, "not run")
        rows.append((claim.statement, f"`{id}`", f"`{claim.command}`", files, status))
    return table(("promise", "claim", "tried by", "in", "last time"), rows)


README_PARTS: dict[str, Callable[[], str]] = {
    "worker-settings": worker_settings,
    "client-settings": client_settings,
    "gateway-settings": gateway_settings,
    "exit-codes": exit_codes,
    "client-help": client_help,
    "volume-help": volume_help,
    "plan": gpu_table.example,
    "gpus": gpus,
    "make-help": make_help,
    "files": files,
}
PAGES = {"README.md": README_PARTS, "SECURITY.md": {"promises": promises}}
_PART = re.compile(r"(<!-- made: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def made(page: str, text: str) -> str:
    """Return the text of a page with its parts made anew; ValueError unless each is there once."""
    parts = PAGES[page]
    found = [match[2] for match in _PART.finditer(text)]
    if sorted(found) != sorted(parts):
        raise ValueError(f"{page} has the parts {found}, wanted are {list(parts)}")
    return _PART.sub(lambda match: f"{match[1]}{parts[match[2]]()}\n{match[3]}", text)


def main(argv: list[str] | None = None) -> int:
    """Write the pages, or with `--check` compare them; return the exit code."""
    parser = argparse.ArgumentParser(prog="make_docs.py", description="Make the pages' parts.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check = parser.parse_args(argv).check
    stale = False
    for name in PAGES:
        path = ROOT / name
        old = path.read_text()
        new = made(name, old)
        if old == new:
            continue
        stale = True
        if check:
            print(f"{name} is not what the code says; run: .venv/bin/python tools/make_docs.py")
        else:
            path.write_text(new)
            print(f"{name} written anew")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
