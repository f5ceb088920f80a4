"""`make image-test`, first half: the CPU engine's image on this machine, without a Docker engine.

Makes a Debian with debootstrap, builds the Dockerfile on it with buildah, and puts tiny-llama
in as a gated model from a Hub on loopback. What was done before is not done again.
"""

import argparse
import asyncio
import os
import shlex
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.hub import Hub
from tools import buildah
from tools.demo_stage import Screen, tail
from tools.tiny_models import MODELS

SUITE = "bookworm"
LOG = buildah.FOLDER / "build.log"
# What tests/image searches the layers for.
SECRETS = {"hf_token": "hf_secretOfTheBuildOnly7f3a9c", "build_env": "secret-of-the-index-51d2e8"}
PASSED_ON = ("PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT", "UV_DEFAULT_INDEX", "UV_INDEX")
"""Where this machine takes its packages from, as far as tools/setup.sh reads it."""


class BuildFailed(Exception):
    """A step's command failed; the log has its words."""


async def run(screen: Screen, doing: str, *command: str | Path) -> None:
    """Run a command as a step of its own, its last line on the screen; BuildFailed."""
    free = shutil.disk_usage(buildah.FOLDER).free

    def so_far() -> str:
        # buildah is silent while it stores a layer, which takes a minute.
        written = free - shutil.disk_usage(buildah.FOLDER).free
        return f"{max(0, written) / 1e9:.1f} GB written; {''.join(tail(LOG, 1)):.70}"

    with LOG.open("ab") as log:
        async with screen.step(doing, so_far):
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=buildah.ROOT,
                env=buildah.environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            try:
                code = await process.wait()
            finally:
                if process.returncode is None:
                    process.terminate()
                    await process.wait()
    if code:
        raise BuildFailed(f"{doing} failed with exit code {code}")


async def make_base(screen: Screen) -> None:
    """Make the image of a bare Debian, which has nothing but what apt needs."""
    if buildah.exists(buildah.BASE):
        return
    root = buildah.FOLDER / "debian"
    shutil.rmtree(root, ignore_errors=True)
    bootstrap = ["debootstrap", "--variant=minbase", SUITE, str(root), *mirror()]
    await run(screen, "Making a Debian with debootstrap", *bootstrap)
    for left in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / left)
        (root / left / "partial").mkdir(parents=True)
    container = buildah.output("from", "scratch")
    await run(screen, "Making an image of it", *buildah.command("add", "-q", container, root, "/"))
    buildah.output("commit", "--rm", "-q", container, buildah.BASE)
    shutil.rmtree(root)


def mirror() -> list[str]:
    """Return the Debian mirror that this machine uses, if it is a Debian."""
    if not (apt := shutil.which("apt-get")):
        return []
    form = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)"
    asked = [apt, "indextargets", "--format", form, "Created-By: Packages"]
    known = subprocess.run(asked, capture_output=True, text=True)
    fields = (line.split("|") for line in known.stdout.splitlines())
    return [uri for *what, uri in fields if what == ["Debian", "Debian", "main"]][:1]


def build_environment(hub: str, temporary: Path) -> tuple[str, list[str]]:
    """Return the script that tells a build this machine's registries, and the volumes for it."""
    told = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    told |= {"HF_ENDPOINT": hub, "INDEX_PASSWORD": SECRETS["build_env"]}
    volumes: list[str] = []
    if certificates := ssl.get_default_verify_paths().cafile:
        # A folder, because the image keeps an empty one of that name, or else an empty file.
        (temporary / "certificates").mkdir()
        shutil.copy(certificates, temporary / "certificates" / "ca.crt")
        volumes.append(f"--volume={temporary / 'certificates'}:/mnt/certificates:ro")
        told |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT"), "/mnt/certificates/ca.crt")
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    for number, link in enumerate(links):
        if Path(link).is_dir():
            volumes.append(f"--volume={Path(link).resolve()}:/mnt/links{number}:ro")
            links[number] = f"/mnt/links{number}"
    if links:
        told["PIP_FIND_LINKS"] = " ".join(links)
    # What `make setup` downloaded is not downloaded again.
    volumes.append(f"--volume={uv_cache()}:/mnt/uv")
    told["UV_CACHE_DIR"] = "/mnt/uv"
    return "".join(f"export {name}={shlex.quote(told[name])}\n" for name in told), volumes


def uv_cache() -> Path:
    """Return the folder where tools/setup.sh keeps what it downloaded."""
    own = buildah.ROOT / ".cache" / "uv"
    if own.is_dir():
        return own
    asked = [sys.executable, "-m", "uv", "cache", "dir"]
    folder = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def secret(file: Path, content: str) -> str:
    """Write a file that the build alone may read, and return the option for it."""
    file.write_text(content)  # the folder is private
    return f"--secret=id={file.name},src={file}"


async def build(screen: Screen) -> None:
    """Build the Dockerfile as README.md says it is built for a machine without a GPU."""
    model = {path.name: path.read_bytes() for path in (MODELS / "tiny-llama").iterdir()}
    with Hub().serving() as hub, tempfile.TemporaryDirectory(dir=buildah.FOLDER) as temporary:
        revision = hub.add(buildah.MODEL, model, gated=True)
        hub.tokens.add(SECRETS["hf_token"])
        hub.granted.add(SECRETS["hf_token"])
        script, volumes = build_environment(hub.url, Path(temporary))
        files = {"build_env": script, "hf_token": SECRETS["hf_token"]}
        secrets = [secret(Path(temporary, name), content) for name, content in files.items()]
        arguments = {
            "BASE": buildah.BASE,
            "ENGINE": "cpu",
            "MODEL": buildah.MODEL,
            "MODEL_REVISION": revision,
        }
        await run(
            screen,
            "Building the Dockerfile",
            *buildah.command("build", "--isolation=chroot", "--layers", "--pull=never"),
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
            *(*secrets, *volumes, f"--tag={buildah.IMAGE}", "."),
        )


async def make() -> None:
    """Make base and image, and leave no container and no image that nobody needs."""
    screen = Screen()
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_bytes(b"")
    try:
        await make_base(screen)
        await build(screen)
    finally:
        buildah.output("rm", "--all")
    # A layer that was replaced has no name any more.
    await run(screen, "Removing layers of older images", *buildah.command("rmi", "--prune"))


def main() -> int:
    """Make the image and return the exit code."""
    argparse.ArgumentParser(
        prog="image_build.py", description=__doc__.split("\n\n")[0]
    ).parse_args()
    began = time.monotonic()
    try:
        asyncio.run(make())
    except (BuildFailed, subprocess.CalledProcessError) as failure:
        print(f"image-test: {failure}; {LOG} ends with:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in tail(LOG, 30)), file=sys.stderr)
        return 1
    print(f"image-test: {buildah.IMAGE} is built, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
