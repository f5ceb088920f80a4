"""The worker from the image in a container: chroot isolation, a root nobody can write, PID 1."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from local_runpod import LocalRunpod
from tests.workers import start, until_ready
from tools import buildah

NAME = "sealed-vllm-image-test"
CACHES = ("/tmp", "/root/.cache")
"""What is in memory, as README's `docker run --read-only` has it, by `--tmpfs …:exec`."""

# buildah's chroot isolation has neither a process namespace nor a root that is only read. What
# Docker adds is added here, and the right to do so is dropped before the worker begins.
_ENTER = """
set -e
for cache in {caches}; do mkdir -p "$cache"; mount -t tmpfs tmpfs "$cache"; done
mount -t proc proc /proc
mount -o remount,bind,ro /
exec setpriv --bounding-set=-sys_admin --inh-caps=-all -- "$@"
"""


class Container:
    """The image's own command, as the platform's worker `pod-1`."""

    def __init__(
        self, platform: LocalRunpod, image: str, folder: Path, settings: dict[str, str]
    ) -> None:
        self._platform = platform
        self._log = folder / "log"
        self._pid = 0
        self.volume = folder / "volume"
        self.volume.mkdir(parents=True)
        variables = {**platform.worker_env("pod-1"), **settings}
        command = buildah.command(
            "run",
            "--isolation=chroot",
            "--cap-add=CAP_SYS_ADMIN",
            f"--volume={self.volume}:/runpod-volume",
            *(f"--env={name}={value}" for name, value in variables.items()),
            *(NAME, "--", "unshare", "--mount", "--pid", "--fork", "--kill-child"),
            *("sh", "-c", _ENTER.format(caches=" ".join(CACHES)), "sh"),
            *buildah.configuration(image)["config"]["Cmd"],
        )
        self.process = start(command, self._log, env=buildah.environment())

    @property
    def log(self) -> str:
        """What all its processes have written, and buildah."""
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The worker's process as this machine counts; to itself it is 1."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if (
                not self._pid
                and process.name().startswith("python")
                and namespace_pid(process) == 1
            ):
                self._pid = process.pid
        return self._pid

    def wait_until_ready(self) -> None:
        """Wait until it asks for jobs."""
        until_ready(self._platform, "pod-1", self.process, self._log)

    def processes(self) -> list[psutil.Process]:
        """Return the container's processes."""
        mine = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for process in psutil.process_iter():
            try:
                if Path(f"/proc/{process.pid}/ns/pid").readlink() == mine:
                    found.append(process)
            except OSError:
                continue
        return found

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command among the container's files."""
        enter = ["nsenter", "--mount", "--root", "--wd=/", f"--target={self.pid}", "--"]
        return subprocess.run([*enter, *command], capture_output=True, text=True)


def namespace_pid(process: psutil.Process) -> int:
    """Return the process's number in its own namespace."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    return int(next(line for line in status.splitlines() if line.startswith("NSpid")).split()[-1])


@contextmanager
def running(
    platform: LocalRunpod, image: str, folder: Path, **settings: str
) -> Iterator[Container]:
    """Start the container and leave nothing of it behind."""
    buildah.output("from", "--pull-never", f"--name={NAME}", image)
    try:
        container = Container(platform, image, folder, settings)
        try:
            yield container
        finally:
            if container.process.poll() is None:
                if container.pid:
                    psutil.Process(container.pid).kill()
                else:
                    container.process.terminate()
                container.process.wait()
    finally:
        buildah.output("rm", NAME)
