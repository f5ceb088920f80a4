"""A Hugging Face Hub on loopback for tests, with faults on demand.

Speaks the part of the Hub's HTTP interface that `huggingface_hub` 2.4 uses to fetch a snapshot:
revision, tree, HEAD and GET of files. Large files redirect to another origin (`localhost`
against `127.0.0.1`), as on the real Hub. Xet is not spoken: that path stays uncovered.
"""

import asyncio
import contextlib
import fnmatch
import hashlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from aiohttp import web

PIECE_BYTES = 64 * 1024

FaultKind = Literal["status", "reset", "cut", "short", "stall", "long", "flip", "slow"]
_BREAKS_OFF = ("reset", "cut", "stall")


@dataclass
class Fault:
    """Something that goes wrong `times` times for requests that match method and path.

    status     answers `status` with `headers`
    reset      resets the connection after `after_bytes` of the body
    cut        closes the connection properly, but after `after_bytes` of the body
    short      announces and sends a body of `after_bytes` only
    stall      sends `after_bytes` of the body and then nothing more
    long       announces and sends a body that is `after_bytes` longer
    flip       sends the whole body with the byte at `after_bytes` inverted
    slow       sends the whole body, but only `bytes_per_s`
    """

    kind: FaultKind
    path: str = "*"
    method: str = "*"
    times: int = 1
    after_bytes: int = 0
    bytes_per_s: float | None = None
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    """One model: its revisions by branch name or commit, each a mapping of file to content."""

    branches: dict[str, str]
    commits: dict[str, dict[str, bytes]]
    gated: bool = False
    private: bool = False


class Hub:
    """The server: add models and faults at any time, read `requests` afterwards."""

    def __init__(self, *, bytes_per_s: float | None = None, lfs_from_bytes: int = 4096) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        self.granted: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.body_bytes = 0
        self.bytes_per_s = bytes_per_s
        self.lfs_from_bytes = lfs_from_bytes
        self.url = ""
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()

    def add(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        branch: str = "main",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Publish a commit of a model on a branch and return its sha."""
        repository = self.repositories.setdefault(name, Repository({}, {}))
        repository.gated, repository.private = gated, private
        digest = hashlib.sha1(repr((name, branch, sorted(files.items()))).encode())
        sha = digest.hexdigest()
        repository.commits[sha] = dict(files)
        repository.branches[branch] = sha
        return sha

    def fault(self, kind: FaultKind, **more: object) -> Fault:
        """Add a fault; `more` are the fields of Fault."""
        fault = Fault(kind, **more)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def count(self, pattern: str = "*") -> int:
        """Return how many requests, written as `METHOD /path`, match the pattern."""
        return len(fnmatch.filter(self.requests, pattern))

    def forget(self) -> None:
        """Clear what was recorded."""
        self.requests.clear()
        self.ranges.clear()
        self.body_bytes = 0

    # ------------------------------------------------------------ HTTP

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.requests.append(f"{request.method} {path}")
        if "Range" in request.headers:
            self.ranges.append(request.headers["Range"])
        fault = self._due(request)
        if fault is not None and fault.kind == "status":
            return web.Response(status=fault.status, headers=dict(fault.headers))
        if path.startswith("/api/models/"):
            return self._api(request, path.removeprefix("/api/models/"))
        if path.startswith("/cdn/"):
            name, _, rest = path.removeprefix("/cdn/").partition("/resolve/")
            sha, _, file = rest.partition("/")
            return await self._body(request, self.repositories[name].commits[sha][file], fault, {})
        if "/resolve/" in path:
            return await self._file(request, fault)
        return web.json_response({"standardEnvVars": [], "harnesses": {}})

    def _due(self, request: web.Request) -> Fault | None:
        for fault in self.faults:
            if (
                fault.times > 0
                and fnmatch.fnmatchcase(request.path, fault.path)
                and fnmatch.fnmatchcase(request.method, fault.method)
                # The request that only redirects has no body that could break off.
                and (fault.kind == "status" or request.method == "GET")
                and (fault.kind == "status" or not self._redirects(request))
            ):
                fault.times -= 1
                return fault
        return None

    def _redirects(self, request: web.Request) -> bool:
        name, found, rest = request.path.removeprefix("/").partition("/resolve/")
        sha, _, file = rest.partition("/")
        if not found or name not in self.repositories:
            return False
        content = self.repositories[name].commits.get(sha, {}).get(file, b"")
        return len(content) >= self.lfs_from_bytes

    def _refusal(self, request: web.Request, name: str, *, files: bool) -> web.Response | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            message = "Invalid credentials in Authorization header"
            return web.json_response(
                {"error": message}, status=401, headers={"X-Error-Message": message}
            )
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token not in self.granted):
            status = 404 if token else 401
            return web.json_response(
                {"error": "Repository not found"},
                status=status,
                headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
            )
        # The real Hub shows info and tree of a gated model to everybody.
        if files and repository.gated and token not in self.granted:
            return web.json_response(
                {"error": "Access to this model is restricted"},
                status=403 if token else 401,
                headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"},
            )
        return None

    @staticmethod
    def _unknown(what: Literal["Revision", "Entry"]) -> web.Response:
        return web.json_response(
            {"error": f"{what} not found"},
            status=404,
            headers={"X-Error-Code": f"{what}NotFound", "X-Error-Message": f"{what} not found"},
        )

    def _api(self, request: web.Request, path: str) -> web.Response:
        kind = "tree" if "/tree/" in path else "revision"
        name, _, revision = path.partition(f"/{kind}/")
        if refusal := self._refusal(request, name, files=False):
            return refusal
        repository = self.repositories[name]
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            return self._unknown("Revision")
        if kind == "revision":
            return web.json_response({"id": name, "sha": sha, "siblings": []})
        entries = [self._entry(file, content) for file, content in repository.commits[sha].items()]
        return web.json_response(entries)

    def _entry(self, file: str, content: bytes) -> dict[str, object]:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": file, "size": len(content), "oid": oid}
        if len(content) >= self.lfs_from_bytes:
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return entry

    async def _file(self, request: web.Request, fault: Fault | None) -> web.StreamResponse:
        name, _, rest = request.path.removeprefix("/").partition("/resolve/")
        if refusal := self._refusal(request, name, files=True):
            return refusal
        revision, _, file = rest.partition("/")
        repository = self.repositories[name]
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            return self._unknown("Revision")
        if file not in repository.commits[sha]:
            return self._unknown("Entry")
        content = repository.commits[sha][file]
        entry = self._entry(file, content)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if len(content) < self.lfs_from_bytes:
            return await self._body(
                request, content, fault, headers | {"ETag": f'"{entry["oid"]}"'}
            )
        headers |= {
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"http://localhost:{self._port}/cdn/{name}/resolve/{sha}/{file}?Signature=s3cret",
        }
        return web.Response(status=302, headers=headers)

    async def _body(
        self,
        request: web.Request,
        content: bytes,
        fault: Fault | None,
        headers: Mapping[str, str],
    ) -> web.StreamResponse:
        bytes_per_s = self.bytes_per_s
        match fault:
            case Fault(kind="short"):
                content = content[: fault.after_bytes]
            case Fault(kind="long"):
                content += bytes(fault.after_bytes)
            case Fault(kind="flip"):
                damaged = bytearray(content)
                damaged[fault.after_bytes] ^= 0xFF
                content = bytes(damaged)
            case Fault(kind="slow"):
                bytes_per_s = fault.bytes_per_s
        response = web.StreamResponse(headers=dict(headers))
        start = 0
        if (asked := request.headers.get("Range", "")).startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first)
            whole, content = len(content), content[: int(last) + 1] if last else content
            response.set_status(206)
            response.headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{whole}"
        response.content_length = len(content) - start
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        end = len(content)
        if fault is not None and fault.kind in _BREAKS_OFF:
            end = min(end, start + fault.after_bytes)
        with contextlib.suppress(ConnectionError):
            for at in range(start, end, PIECE_BYTES):
                piece = content[at : min(at + PIECE_BYTES, end)]
                await response.write(piece)
                self.body_bytes += len(piece)
                if bytes_per_s:
                    await asyncio.sleep(len(piece) / bytes_per_s)
            if fault is not None and fault.kind in _BREAKS_OFF:
                await self._break_off(request, fault)
        return response

    async def _break_off(self, request: web.Request, fault: Fault) -> None:
        transport = request.transport
        if transport is None:
            return
        if fault.kind == "stall":
            await self._closing.wait()
        elif fault.kind == "reset":
            # Give the bytes time to leave: a reset discards what is still in the buffers.
            await asyncio.sleep(0.05)
            sock: socket.socket = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()

    # ------------------------------------------------------------ life

    def _run(self, ready: Callable[[], None]) -> None:
        asyncio.set_event_loop(self._loop)

        async def serve() -> None:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", self._answer)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self._port = runner.addresses[0][1]
            self.url = f"http://127.0.0.1:{self._port}"
            ready()
            await self._closing.wait()
            await runner.cleanup()

        self._loop.run_until_complete(serve())
        self._loop.close()

    @contextlib.contextmanager
    def serving(self) -> Iterator["Hub"]:
        """Serve in a thread of its own for as long as the context lasts."""
        up = threading.Event()
        thread = threading.Thread(target=self._run, args=(up.set,), daemon=True)
        thread.start()
        if not up.wait(10):
            raise RuntimeError("the test Hub did not start within 10 s")
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._closing.set)
            thread.join(10)
