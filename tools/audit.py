"""Compares what is installed with a database of known vulnerabilities: `make audit`.

    tools/audit.py                  pip-audit, in an environment of its own, asks the network
    tools/audit.py --database DIR   a clone of github.com/pypa/advisory-database, without a network

Ends with 0 where nothing is known against what is installed, with 1 where something is, and with 2
where a database could not be asked about every package: it says so then.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".audit"
PIP_AUDIT = "pip-audit==2.10.1"


@dataclass(frozen=True)
class Finding:
    """An advisory that is about an installed version."""

    package: str
    version: str
    advisory: str
    fixed: str

    def __str__(self) -> str:
        cure = f"fixed in {self.fixed}" if self.fixed else "no version is fixed"
        return f"{self.package} {self.version}: {self.advisory}, {cure}"


def installed() -> dict[str, str]:
    """Return the version of every installed package."""
    return {
        canonicalize_name(found.metadata["Name"]): found.version
        for found in metadata.distributions()
        if found.metadata["Name"]
    }


def findings(database: Path, packages: Mapping[str, str]) -> Iterator[Finding]:
    """Yield every advisory of a clone that is about one of the packages."""
    for package, version in sorted(packages.items()):
        for path in sorted((database / "vulns" / package).glob("*.yaml")):
            advisory = yaml.safe_load(path.read_text())
            if advisory.get("withdrawn"):
                continue
            for affected in advisory.get("affected", ()):
                events = _events(affected)
                if _is_affected(version, affected.get("versions", ()), events):
                    fixed = [event["fixed"] for event in events if "fixed" in event]
                    yield Finding(package, version, advisory["id"], ", ".join(fixed))
                    break


def _events(affected: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        event
        for span in affected.get("ranges", ())
        if span["type"] == "ECOSYSTEM"
        for event in span["events"]
    ]


def _is_affected(text: str, versions: Sequence[str], events: Sequence[Mapping[str, str]]) -> bool:
    """Whether a version is listed, or lies in a range of OSV's events."""
    if text in versions:
        return True
    version, inside = _version(text), False
    for event in events:
        if "introduced" in event:
            inside |= version >= _version(event["introduced"])
        elif "fixed" in event:
            inside &= version < _version(event["fixed"])
        elif "last_affected" in event:
            inside &= version <= _version(event["last_affected"])
    return inside


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0")


def ask_the_network(packages: Mapping[str, str]) -> int:
    """Run pip-audit on the packages; 2 where it reaches no database."""
    program = ENVIRONMENT / "bin" / "pip-audit"
    if not program.exists():
        made = subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)]).returncode
        pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", PIP_AUDIT]
        if made or subprocess.run(pip).returncode:
            return nothing_known("pip-audit cannot be installed")
    # A version with a local part (a build of torch for one device) is its public one to a database.
    pins = [f"{name}=={version.partition('+')[0]}\n" for name, version in sorted(packages.items())]
    wanted = ENVIRONMENT / "installed.txt"
    wanted.write_text("".join(pins))
    words = [str(program), "--disable-pip", "--no-deps", "--progress-spinner=off", "--format=json"]
    done = subprocess.run([*words, "-r", str(wanted)], stdout=subprocess.PIPE, text=True)
    try:
        answers = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return nothing_known("pip-audit reaches no database")
    found = [
        Finding(each["name"], each["version"], known["id"], ", ".join(known["fix_versions"]))
        for each in answers
        for known in each.get("vulns", ())
    ]
    # A proxy that knows no package makes pip-audit pass over all of them, and end with 0.
    unknown = sorted(packages.keys() - {each["name"] for each in answers if "vulns" in each})
    if unknown and not found:
        shown = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
        return nothing_known(f"{len(unknown)} of {len(packages)} packages not looked up: {shown}")
    return told(packages, found)


def told(packages: Mapping[str, str], found: Sequence[Finding]) -> int:
    """Print what was found."""
    for finding in found:
        print(finding)
    print(f"audit: {len(packages)} packages, {len(found)} known vulnerabilities")
    return int(bool(found))


def nothing_known(reason: str) -> int:
    """Say that nothing was audited."""
    print(
        f"audit: {reason}. Nothing is known about these; give a clone of "
        "github.com/pypa/advisory-database: make audit DATABASE=DIR",
        file=sys.stderr,
    )
    return 2


def main(args: Sequence[str] | None = None) -> int:
    """Audit what is installed here, and return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--database", type=Path, metavar="DIR", help="a clone of the database")
    database = parser.parse_args(args).database
    packages = installed()
    if database is None:
        return ask_the_network(packages)
    if not (database / "vulns").is_dir():
        return nothing_known(f"{database} has no folder `vulns`")
    return told(packages, list(findings(database, packages)))


if __name__ == "__main__":
    sys.exit(main())
