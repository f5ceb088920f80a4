"""The import rules of AGENTS.md, on the code as it is, and what the client needs as it runs."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
NEVER_ON_THE_CLIENT = {"vllm", "torch", "runpod", "huggingface_hub", "transformers"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the first part of every imported name, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield (node.module or "").split(".")[0]


TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
IMPORTS = {name: set(imports(tree)) for name, tree in TREES.items()}
EDGES = {name: found & MODULES.keys() for name, found in IMPORTS.items()}


def table(head: str) -> dict[str, set[str]]:
    """Return the table of AGENTS.md that begins with `head`."""
    lines = (ROOT / "AGENTS.md").read_text().splitlines()
    rows = {}
    for line in lines[lines.index(head) + 2 :]:
        if not line.startswith("|"):
            break
        name, value = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name.strip("`")] = {word for word in value.split(", ") if word}
    return rows


def closure(name: str) -> set[str]:
    """Return a module and everything it imports, directly or not."""
    found: set[str] = set()
    waiting = {name}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= EDGES[name] - found
    return found


CLIENT = closure("client")


def test_every_edge_is_in_the_table_and_every_entry_is_an_edge() -> None:
    assert table("| module | imports |") == EDGES


def test_imports_are_not_circular() -> None:
    edges = dict(EDGES)
    # Run as programs, these hand over to their commands.
    for module, commands in (("client", "commands"), ("utils", "model_commands")):
        assert commands not in {
            name for node in TREES[module].body if is_import(node) for name in imports(node)
        }
        edges[module] = edges[module] - {commands}
    try:
        list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        pytest.fail(f"circular imports: {' → '.join(error.args[1])}")


def is_import(node: ast.AST) -> bool:
    """Whether a statement is an import itself."""
    return isinstance(node, ast.Import | ast.ImportFrom)


def test_each_package_is_imported_where_the_table_says() -> None:
    for package, allowed in table("| package | only in |").items():
        assert {name for name, found in IMPORTS.items() if package in found} == allowed, package


def test_no_module_imports_tests_or_tools() -> None:
    assert not [name for name, found in IMPORTS.items() if found & {"tests", "tools"}]


READS_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}


def reads_environment(tree: ast.AST) -> set[str]:
    """Return the functions (or "module") that touch the process's environment through os."""
    found = set()

    def walk(node: ast.AST, where: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = node.name
        if isinstance(node, ast.Attribute) and node.attr in READS_ENVIRONMENT:
            # `libc.getenv` is how worker_environment erases a secret: the same environment.
            found.add(where)
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found.update(where for alias in node.names if alias.name in READS_ENVIRONMENT)
        for child in ast.iter_child_nodes(node):
            walk(child, where)

    walk(tree, "module")
    return found


def test_only_the_settings_read_the_environment() -> None:
    readers = {name: found for name, tree in TREES.items() if (found := reads_environment(tree))}
    assert readers.keys() == {"worker_environment", "client_config", "local_runpod"}
    assert readers["client_config"] == {"environment"}
    assert readers["local_runpod"] == {"main"}


def test_the_search_for_readers_finds_each_spelling() -> None:
    for code in (
        "import os\ndef f(): return os.environ['A']",
        "import os\ndef f(): return os.getenv('A')",
        "def f():\n from os import environ",
        "import os as o\ndef f(): return dict(o.environ)",
    ):
        assert reads_environment(ast.parse(code)) == {"f"}, code


def test_the_client_s_code_names_nothing_of_the_worker() -> None:
    for name in CLIENT:
        assert not IMPORTS[name] & NEVER_ON_THE_CLIENT, name


def test_the_client_loads_nothing_of_the_worker() -> None:
    code = "import client, commands, doctor, gateway, json, sys; print(json.dumps([*sys.modules]))"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    loaded = set(json.loads(printed))
    assert not loaded & NEVER_ON_THE_CLIENT
    # What was loaded of this project is what the package holds.
    assert loaded & MODULES.keys() == CLIENT


def test_the_package_holds_what_the_client_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["py-modules"]) == CLIENT
    extras = project["project"]["optional-dependencies"]
    wanted = {
        re.split(r"[<>=\[ ]", line)[0].replace("-", "_")
        for line in [*project["project"]["dependencies"], *extras["gateway"]]
    }
    used = set().union(*(IMPORTS[name] for name in CLIENT)) - MODULES.keys()
    # Starlette reads forms with it and does not ask for it by itself.
    assert used - set(sys.stdlib_module_names) | {"python_multipart"} == wanted


# Spelt in pieces, so that this file does not hold what it looks for.
OTHER_PEOPLE_S_BUSINESS = re.compile(
    "|".join(
        (
            # Where this checkout and its Python lie, unless that is where everybody's lie.
            *(re.escape(str(path)) for path in (ROOT, Path(sys.base_prefix)) if path.parts[3:]),
            r"(?<![\w.])/wo" + r"rk/",
            r"(?:pypi|files\.pythonhosted)" + r"\.org",
            r"art" + r"ifactory|nex" + r"us\.",
            r"index-" + r"url\s*=?\s*http",
        )
    )
)


def texts() -> Iterator[tuple[str, str]]:
    """Yield each file of the project that is text, and its content."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name in listed:
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 1_000_000:
            try:
                yield name, path.read_text()
            except UnicodeDecodeError:
                continue


def test_nothing_names_a_machine_or_where_packages_came_from() -> None:
    found = [
        f"{name}: {match[0]}"
        for name, text in texts()
        for match in OTHER_PEOPLE_S_BUSINESS.finditer(text)
    ]
    assert not found
