"""RunPod on one machine: the platform that a worker and a client see, for demo, development, tests.

Owns the platform's life: start, stop, the environment that connects a worker, and
the command. The HTTP is in `local_runpod_http`, the jobs in `local_runpod_queue`,
the faults in `local_runpod_faults`, the worker processes in `local_runpod_workers`.

    with LocalRunpod() as platform:
        subprocess.Popen(worker, env={**environment, **platform.worker_env("pod-1")})
        httpx.post(f"{platform.base_url}/local/run", ...)

From a shell: `python local_runpod.py -- python rp_handler.py`.
"""

import argparse
import asyncio
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from aiohttp import web

from local_runpod_faults import Faults
from local_runpod_http import Exchange, Http, Options, Record
from local_runpod_queue import Job, Queue, Worker
from local_runpod_workers import Workers


@dataclass(kw_only=True, eq=False)
class LocalRunpod(Options):
    """The platform: a context manager, sync (with a thread of its own) or async.

    `port` is the real one once it runs; `faults` may be changed at any time.
    """

    def __post_init__(self) -> None:
        if self.ping_interval_ms < 1000:
            raise ValueError("a ping_interval_ms below 1000 ends the SDK's pinging")
        self.faults = Faults()
        self._queue = Queue(retries=self.retries)
        self._record = Record(self.record_bytes)
        self._http = Http(self, self._queue, self.faults, self._record)
        self._runner: web.AppRunner | None = None
        self._watch: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        """What `https://api.runpod.ai/v2` is to the real platform."""
        return f"http://{self.host}:{self.port}/v2"

    @property
    def jobs(self) -> Mapping[str, Job]:
        """The jobs by id, as long as the platform keeps them."""
        return dict(self._queue.jobs)

    @property
    def workers(self) -> Mapping[str, Worker]:
        """The workers by id, without those whose process ended."""
        return dict(self._queue.workers)

    @property
    def exchanged(self) -> list[Exchange]:
        """The bodies exchanged so far, oldest first, as far as `record_bytes` holds."""
        return list(self._record.entries)

    @property
    def exchanged_lost(self) -> int:
        """How many older bodies `record_bytes` had no room for."""
        return self._record.lost

    def worker_env(self, worker_id: str) -> dict[str, str]:
        """Return the variables that make the SDK of a process serve this platform as `worker_id`.

        From here on the worker counts as initializing.
        """
        self._queue.worker(worker_id)
        base = f"{self.base_url}/{self.endpoint_id}"
        # The SDK prefers the key in ~/.runpod/config.toml over RUNPOD_AI_API_KEY, so the header
        # cannot identify a worker on a developer's machine; the query can, and the SDK needs
        # a "?" anyway, since it appends "&...".
        key = f"?key={self.worker_key}"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID{key}",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID{key}",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID{key}",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID{key}",
            "RUNPOD_PING_INTERVAL": str(self.ping_interval_ms),
            "RUNPOD_AI_API_KEY": self.worker_key,
            "RUNPOD_POD_ID": worker_id,
            "RUNPOD_POD_HOSTNAME": worker_id,
            "RUNPOD_ENDPOINT_ID": self.endpoint_id,
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        }

    def drain(self, worker_id: str) -> None:
        """Give the worker no more jobs and end its held polls; do it before SIGTERM."""
        self._call(self._queue.drain, self._queue.worker(worker_id))

    def lose(self, worker_id: str) -> None:
        """Tell the platform that the worker's process is gone, so that its jobs move on at once."""
        self._call(self._queue.forget, self._queue.worker(worker_id))

    def _call(self, function: Callable[..., object], *args: Any) -> None:
        if self._loop is None:
            function(*args)
        else:
            self._loop.call_soon_threadsafe(function, *args)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="local_runpod", daemon=True
        )
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.__aenter__(), self._loop).result()
        except BaseException:
            self._end_thread()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop:
            leaving = self.__aexit__(None, None, None)
            asyncio.run_coroutine_threadsafe(leaving, self._loop).result()
        self._end_thread()

    def _end_thread(self) -> None:
        if self._loop and self._thread:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._loop = self._thread = None

    async def __aenter__(self) -> Self:
        # A held poll whose client goes away has to end at once, not at its deadline.
        self._runner = web.AppRunner(
            self._http.application(),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=2.0,
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, self.port, backlog=1024).start()
        self.port = self._runner.addresses[0][1]
        self._watch = asyncio.create_task(self._http.watch_workers())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._queue.close()
        if self._watch:
            self._watch.cancel()
        if self._runner:
            await self._runner.cleanup()


def main(argv: list[str] | None = None) -> int:
    """Run the platform and the workers of the command until a signal or the workers' end."""
    parser = argparse.ArgumentParser(
        prog="local_runpod.py",
        description="RunPod on one machine: a platform and workers that serve it.",
        usage="%(prog)s [options] [-- COMMAND...]",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--endpoint", default="local", metavar="NAME", help="endpoint id")
    parser.add_argument(
        "--api-key-env",
        default="RUNPOD_API_KEY",
        metavar="VAR",
        help="variable that holds the clients' API key; unset: a fresh key is made and shown",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="workers of COMMAND")
    parser.add_argument(
        "--restarts", type=int, default=3, metavar="N", help="of a worker that fails"
    )
    parser.add_argument("--allow-faults", action="store_true", help="serve /control/faults")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="what a worker runs")
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s local_runpod %(message)s"
    )
    environment = dict(os.environ)
    # A worker has no business with the clients' key.
    api_key = environment.pop(arguments.api_key_env, None)
    platform = LocalRunpod(
        endpoint_id=arguments.endpoint,
        api_key=api_key or secrets.token_urlsafe(24),
        host=arguments.host,
        port=arguments.port,
        allow_faults=arguments.allow_faults,
    )

    async def run() -> int:
        async with platform:
            workers = Workers(
                platform=platform,
                command=arguments.command,
                environment=environment,
                count=arguments.workers,
                restarts=arguments.restarts,
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, workers.stop)
            print(platform.base_url, flush=True)
            print(_how_to_reach(platform, arguments.api_key_env, not api_key), file=sys.stderr)
            return await workers.run()

    return asyncio.run(run())


def _how_to_reach(platform: LocalRunpod, variable: str, fresh: bool) -> str:
    lines = [
        f"export RUNPOD_API_BASE={platform.base_url}",
        f"export RUNPOD_ENDPOINT_ID={platform.endpoint_id}",
    ]
    if fresh:
        lines.append(f"export {variable}={platform.api_key}")
    url = f"{platform.base_url}/{platform.endpoint_id}/health"
    lines.append(f'curl -H "Authorization: Bearer ${variable}" {url}')
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
