"""`make bench`: the worker through the real SDK and the local platform against the bare engine,
in one run on one machine, the gateway against the same worker without seals, and what the front
end costs when the model is fast.

Rounds of both alternate, so that a machine that slows down slows both. Claims are ratios
within the run. Writes `bench/results.json`, prints a table, with --plot `bench/results.png`.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from client import AsyncClient
from keys import generate_key
from local_runpod import LocalRunpod
from tools import bench_gateway
from tools.bench_round import FOLDER, HERE, OPTIONS, PROMPT, Round, say


@dataclass
class Result:
    """All rounds at one concurrency."""

    concurrency: int
    bare: list[Round] = field(default_factory=list)
    worker: list[Round] = field(default_factory=list)
    round_trip_ms: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return the figures that the table shows; times are medians over all requests."""

        def first(rounds: list[Round]) -> float:
            return statistics.median(ms for one in rounds for ms in one.first_ms)

        def speed(rounds: list[Round]) -> float:
            return statistics.median(one.tokens_per_s for one in rounds)

        ratios = [
            w.tokens_per_s / b.tokens_per_s for w, b in zip(self.worker, self.bare, strict=True)
        ]
        round_trip = statistics.median(self.round_trip_ms)
        return {
            "bare_tokens_per_s": speed(self.bare),
            "worker_tokens_per_s": speed(self.worker),
            "throughput_ratio": statistics.median(ratios),
            "bare_first_ms": first(self.bare),
            "worker_first_ms": first(self.worker),
            "platform_round_trip_ms": round_trip,
            "added_first_ms": first(self.worker) - first(self.bare) - round_trip,
            "handler_cpu_us_per_token": statistics.median(
                one.cpu_us_per_token or 0 for one in self.worker
            ),
        }


class Bare:
    """The bare engine's process."""

    def __init__(self, model: str, log: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "tools" / "bench_bare.py"), model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def ask(self, question: dict[str, int] | None = None) -> dict[str, Any]:
        """Send a question and return the next JSON line."""
        assert self._process.stdin and self._process.stdout
        if question:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit("the bare engine ended, see bench/bare.log")

    def close(self) -> None:
        """End it and the engine's processes, which outlive one that is ended by a signal."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


async def worker_round(
    client: AsyncClient, process: psutil.Process, concurrency: int, requests: int, tokens: int
) -> Round:
    """Run one round through the worker; the handler's CPU time is that of its process alone."""

    async def one(number: int) -> tuple[float, int]:
        started, first = time.perf_counter(), 0.0
        async with client.chat(
            PROMPT.format(number), stream=True, temperature=0, max_tokens=tokens, ignore_eos=True
        ) as stream:
            async for _ in stream:
                first = first or time.perf_counter() - started
            answer = await stream.answer()
        return first, (answer.usage or {})["completion_tokens"]

    before = process.cpu_times()
    result = await Round.measure(one, requests, concurrency)
    after = process.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    result.cpu_us_per_token = 1e6 * cpu / result.tokens
    return result


async def measure(
    client: AsyncClient, process: psutil.Process, bare: Bare, args: Any
) -> list[Result]:
    """Alternate rounds of both at each concurrency."""
    results = []
    for concurrency, requests in ((1, 4), (16, 32)):
        result = Result(concurrency)
        for number in range(args.rounds + 1):
            asked = {"concurrency": concurrency, "requests": requests, "tokens": args.tokens}
            plain = Round(**await asyncio.to_thread(bare.ask, asked))
            sealed = await worker_round(client, process, concurrency, requests, args.tokens)
            trips = []
            for _ in range(10):
                started = time.perf_counter()
                await client.worker()
                trips.append(1000 * (time.perf_counter() - started))
            if number == 0:
                continue  # the first round warms both
            result.bare.append(plain)
            result.worker.append(sealed)
            result.round_trip_ms += trips
            say(
                f"concurrency {concurrency}, round {number}: bare {plain.tokens_per_s:.1f} tok/s, "
                f"worker {sealed.tokens_per_s:.1f} tok/s"
            )
        results.append(result)
    return results


def through_platform(args: Any) -> list[Result]:
    """Start the bare engine, the platform and the worker, and measure them."""
    key, api_key = generate_key(), "bench"
    with (
        open(FOLDER / "worker.log", "w") as worker_log,
        open(FOLDER / "bare.log", "w") as bare_log,
        LocalRunpod(endpoint_id="bench", api_key=api_key) as runpod,
    ):
        say("starting the bare engine and the worker")
        bare = Bare(args.model, bare_log)
        bare.ask()
        settings = {"MODELS": args.model, "ENCRYPTION_KEY": key, "SERVED_MODEL_NAME": "bench"}
        worker = subprocess.Popen(
            [sys.executable, str(HERE / "rp_handler.py")],
            env={**os.environ, **OPTIONS, **settings, **runpod.worker_env("bench-worker")},
            stdout=worker_log,
            stderr=worker_log,
        )

        async def run() -> list[Result]:
            async with AsyncClient(
                endpoint_id="bench",
                api_key=api_key,
                encryption_key=key,
                api_base=runpod.base_url,
            ) as client:
                await client.worker()
                return await measure(client, psutil.Process(worker.pid), bare, args)

        try:
            return asyncio.run(run())
        finally:
            bare.close()
            worker.terminate()
            worker.wait()


def ceiling(args: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Return what `ceiling.py` measures."""
    say("measuring the front end with a core that emits 20,000 tokens/s")
    with open(FOLDER / "ceiling.log", "w") as log:
        done = subprocess.run(
            [sys.executable, str(HERE / "tools" / "ceiling.py"), "--model", args.model],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=True,
        )
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    figures: dict[str, dict[str, dict[str, float]]] = json.loads(line)
    return figures


def machine() -> str:
    """Return the machine by its size."""
    memory = round(psutil.virtual_memory().total / 2**30)
    return f"{os.cpu_count()} cores, {memory} GiB, no GPU, {platform.machine()}"


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        f"Machine: {report['machine']}; model: {report['model']}; {report['date']}.",
        "",
        "| through the SDK and the local platform | concurrency 1 | concurrency 16 |",
        "| --- | --- | --- |",
    ]
    rows = (
        ("bare engine, tokens/s", "bare_tokens_per_s", "{:.1f}"),
        ("worker, tokens/s", "worker_tokens_per_s", "{:.1f}"),
        ("worker / bare engine", "throughput_ratio", "{:.3f}"),
        ("bare engine, first token, ms", "bare_first_ms", "{:.1f}"),
        ("worker, first token, ms", "worker_first_ms", "{:.1f}"),
        ("platform's own round trip, ms", "platform_round_trip_ms", "{:.1f}"),
        ("added to the first token, ms", "added_first_ms", "{:.1f}"),
        ("handler process, CPU µs per token", "handler_cpu_us_per_token", "{:.0f}"),
    )
    for label, name, form in rows:
        cells = (form.format(summary[name]) for summary in report["throughput"].values())
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", *bench_gateway.table(report["gateway"])]
    lengths = list(next(iter(report["ceiling"].values())))
    columns = [f"{int(tokens):,} tokens each" for tokens in lengths]
    lines += [
        "",
        "CPU µs per token of the handler's process, 128 streams, a core with 20,000 tokens/s:",
        "",
        f"| | {' | '.join(columns)} |",
        f"| --- |{' --- |' * len(columns)}",
    ]
    for name, case in report["ceiling"].items():
        cells = (f"{case[tokens]['cpu_us_per_token']:.1f}" for tokens in lengths)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the report."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = list(report["throughput"])
    for offset, (label, key) in enumerate(
        (("bare engine", "bare_tokens_per_s"), ("worker, sealed", "worker_tokens_per_s"))
    ):
        values = [report["throughput"][name][key] for name in names]
        bars = left.bar(
            [number + 0.4 * offset for number in range(len(names))], values, 0.38, label=label
        )
        left.bar_label(bars, fmt="%.0f")
    left.set_xticks(
        [number + 0.2 for number in range(len(names))], [f"concurrency {n}" for n in names]
    )
    left.set_ylabel("tokens/s")
    left.set_title("Through the SDK and the local platform")
    left.legend()
    cases = report["ceiling"]
    longest = max(next(iter(cases.values())), key=int)
    costs = [case[longest]["cpu_us_per_token"] for case in cases.values()]
    bars = right.barh(list(cases), costs)
    right.bar_label(bars, fmt="%.1f")
    right.invert_yaxis()
    right.set_xlabel("CPU µs per token")
    right.set_title("Handler process, 128 streams at 20,000 tokens/s")
    figure.suptitle(report["machine"], fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(HERE / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="per request")
    parser.add_argument("--plot", action="store_true", help="also draw bench/results.png")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    throughput = {str(result.concurrency): result.summary() for result in through_platform(args)}
    report = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "model": Path(args.model).name,
        "throughput": throughput,
        "gateway": bench_gateway.measure(args.model, args.rounds, args.tokens),
        "ceiling": ceiling(args),
    }
    (FOLDER / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    (FOLDER / "results.md").write_text(table(report) + "\n")
    print(table(report))
    if args.plot:
        plot(report, FOLDER / "results.png")
        say(f"picture: {FOLDER / 'results.png'}")


if __name__ == "__main__":
    main()
