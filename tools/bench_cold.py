"""`make bench-cold`: from process start to the first token, ours against `vllm serve`.

One model, one run, starts in turn: ours on an empty volume (a Hub on loopback at 50 MB/s), on a
warm one, on a warm one with the Hub dead, and vLLM's own server on the warm one, asked as soon as
its health route answers. Prints a table, writes `bench/cold.json`, with --plot `bench/cold.png`.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import readiness
import readiness_report
from client import Client
from keys import generate_key
from local_runpod import LocalRunpod
from tests.hub import Hub
from tools.bench import machine
from tools.bench_round import FOLDER, HERE, say

NAME = "bench/model"
HUB_BYTES_PER_S = 50e6
START_TIMEOUT_S = 600
PROMPT = "Say one word."
SERVER = "vllm.entrypoints.launchers.api_server.entry"
OPTIONS = {"MAX_MODEL_LEN": "2048", "KV_CACHE_MEMORY_BYTES": str(2**28)}


@dataclass
class Start:
    """One start; seconds since the process was begun, phases where the worker tells them."""

    case: str
    ready_s: float
    first_token_s: float
    phases: dict[str, Any] | None = None


class Bench:
    """A volume, a Hub and what both kinds of start have in common."""

    def __init__(self, folder: Path, hub: Hub, args: argparse.Namespace) -> None:
        self._volume = folder / "volume"
        self._disk = folder / "disk"
        self._hub = hub
        self._args = args

    def environment(self, hub: str) -> dict[str, str]:
        """Return what a start of either kind finds around it."""
        if self._args.fresh_disk:
            shutil.rmtree(self._disk, ignore_errors=True)
            os.environ["VLLM_CACHE_ROOT"] = str(self._disk)
        return {
            **os.environ,
            "HF_HOME": str(self._volume),
            "HF_HUB_CACHE": str(self._volume / "hub"),
            "HF_ENDPOINT": hub,
            # What the worker switches off by itself, so that neither kind waits for strangers.
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }

    def empty(self) -> None:
        """Take the model off the volume, but nothing else."""
        shutil.rmtree(self._volume / "hub", ignore_errors=True)

    def ours(self, case: str, hub: str) -> Start:
        """Start the worker with a job waiting for it."""
        key = generate_key()
        settings = {"MODELS": NAME, "ENCRYPTION_KEY": key, **OPTIONS}
        if not self._args.compile:
            settings["ENFORCE_EAGER"] = "true"
        with (
            LocalRunpod(endpoint_id="bench", api_key="bench") as runpod,
            (FOLDER / f"cold-{case.replace(' ', '-')}.log").open("w") as log,
            Client(
                endpoint_id="bench",
                api_key="bench",
                encryption_key=key,
                api_base=runpod.base_url,
            ) as client,
        ):
            began = time.time()
            worker = subprocess.Popen(
                [sys.executable, str(HERE / "rp_handler.py")],
                env={**self.environment(hub), **settings, **runpod.worker_env("bench")},
                stdout=log,
                stderr=log,
            )
            with (
                ended(worker),
                client.chat(PROMPT, stream=True, temperature=0, max_tokens=4) as stream,
            ):
                next(iter(stream))
                first_token_s = time.time() - began
                stream.answer()
        record = readiness.kept(self._volume / "sealed-vllm" / "starts")[-1]
        return Start(case, record["ready_s"], first_token_s, record)

    def server(self, case: str, hub: str) -> Start:
        """Start vLLM's own server and ask it as soon as its health route answers."""
        port = free_port()
        options = [f"--model={NAME}"]
        options += [f"--{name.lower().replace('_', '-')}={text}" for name, text in OPTIONS.items()]
        if not self._args.compile:
            options.append("--enforce-eager")
        with (FOLDER / "cold-server.log").open("w") as log, httpx2.Client(timeout=60) as http:
            began = time.time()
            server = subprocess.Popen(
                [sys.executable, "-m", SERVER, "--host=127.0.0.1", f"--port={port}", *options],
                env=self.environment(hub),
                stdout=log,
                stderr=log,
            )
            url = f"http://127.0.0.1:{port}"
            with ended(server):
                wait_for(lambda: answers(http, f"{url}/health"), server)
                ready_s = time.time() - began
                body = {
                    "model": NAME,
                    "messages": [{"role": "user", "content": PROMPT}],
                    "stream": True,
                    "max_tokens": 4,
                }
                with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                    next(line for line in answer.iter_lines() if '"content":"' in line)
                    first_token_s = time.time() - began
        return Start(case, ready_s, first_token_s)

    def run(self) -> list[Start]:
        """Run every case once in each round, after one start that only warms the machine."""
        starts: list[Start] = []
        dead = f"http://127.0.0.1:{free_port()}"
        cases: dict[str, Callable[[str], Start]] = {
            "empty volume": lambda case: self.ours(case, self._hub.url),
            "warm volume": lambda case: self.ours(case, self._hub.url),
            "warm volume, Hub dead": lambda case: self.ours(case, dead),
            "vllm serve, warm volume": lambda case: self.server(case, self._hub.url),
        }
        say("warming the machine")
        self.ours("first", self._hub.url)
        for number in range(self._args.rounds):
            for case, start in cases.items():
                if case == "empty volume":
                    self.empty()
                starts.append(start(case))
                say(f"round {number + 1}, {case}: {starts[-1].first_token_s:.1f} s")
        return starts


@contextlib.contextmanager
def ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """End a process tidily, and by force where it does not."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(met: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Wait until a condition is met; SystemExit if the process ends before."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not met():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the server did not start, see bench/cold-server.log")
        time.sleep(0.05)


def answers(http: httpx2.Client, url: str) -> bool:
    """Whether a route answers 200."""
    with contextlib.suppress(httpx2.HTTPError):
        return http.get(url).status_code == 200
    return False


def free_port() -> int:
    """Return a port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def summary(starts: list[Start]) -> dict[str, Any]:
    """Return medians by case, the ratio to vLLM's server and what the overlap saved."""
    by_case: dict[str, list[Start]] = {}
    for start in starts:
        by_case.setdefault(start.case, []).append(start)
    firsts = {
        case: statistics.median(start.first_token_s for start in some)
        for case, some in by_case.items()
    }

    def phase(case: str, name: str) -> float:
        found = [readiness_report.spans(s.phases).get(name) for s in by_case[case] if s.phases]
        return statistics.median(span[1] - span[0] for span in found if span)

    download_s, imports_s = phase("empty volume", "download"), phase("empty volume", "imports")
    return {
        "first_token_s": firsts,
        "ratio_to_vllm_serve": firsts["warm volume"] / firsts["vllm serve, warm volume"],
        "dead_minus_warm_s": firsts["warm volume, Hub dead"] - firsts["warm volume"],
        "empty_minus_warm_s": firsts["empty volume"] - firsts["warm volume"],
        "download_s": download_s,
        "imports_s": imports_s,
        "one_after_the_other_s": firsts["warm volume"] + download_s,
        "overlap_saved_s": firsts["warm volume"] + download_s - firsts["empty volume"],
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as the README shows it."""
    figures = report["summary"]
    lines = [
        f"Machine: {report['machine']}; model: {report['model']}, {report['mode']}; "
        f"{report['date']}.",
        "",
        "| from process start to the first token | s |",
        "| --- | --- |",
        *(f"| {case} | {first:.1f} |" for case, first in figures["first_token_s"].items()),
        "",
        "| | |",
        "| --- | --- |",
        f"| warm volume / `vllm serve` | {figures['ratio_to_vllm_serve']:.2f} |",
        f"| Hub dead, compared with warm | {figures['dead_minus_warm_s']:+.1f} s |",
        f"| the download alone, at 50 MB/s | {figures['download_s']:.1f} s |",
        f"| empty volume, compared with warm | {figures['empty_minus_warm_s']:+.1f} s |",
        f"| saved by the overlap | {figures['overlap_saved_s']:.1f} s |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="with compilation on")
    parser.add_argument(
        "--fresh-disk", action="store_true", help="an empty local disk at each start"
    )
    parser.add_argument("--plot", action="store_true", help="also draw bench/cold.png")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    files = {path.name: path.read_bytes() for path in args.model.iterdir() if path.is_file()}
    hub = Hub(bytes_per_s=HUB_BYTES_PER_S)
    hub.add(NAME, files)
    with tempfile.TemporaryDirectory() as folder, hub.serving():
        starts = Bench(Path(folder), hub, args).run()
    report = {
        "machine": machine(),
        "model": args.model.name,
        "mode": "compiled" if args.compile else "eager",
        "date": time.strftime("%Y-%m-%d"),
        "summary": summary(starts),
        "starts": [asdict(start) for start in starts],
    }
    (FOLDER / "cold.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    if args.plot:
        last = {start.case: start.phases for start in starts if start.phases}
        readiness_report.plot([{**p, "source": c} for c, p in last.items()], FOLDER / "cold.png")
        say(f"picture: {FOLDER / 'cold.png'}")


if __name__ == "__main__":
    main()
