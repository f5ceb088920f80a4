"""A worker behind a platform, the gateway before it, and clients of both kinds.

Each client that was written for OpenAI's servers runs as one of scripts/ in an environment
of its own (.clients/, made by `make clients`) and tells what it made of the answers. The tests
hold that against what the worker says to the native client when it is asked the same, and against
what the platform carried.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import Client, Response
from client_config import ClientSettings
from crypto import RequestOpener
from errors import RequestError
from keys import KeyRing
from local_runpod import LocalRunpod
from local_runpod_queue import Job
from protocol import MAX_TTL_S
from tests.gateways import RunningGateway
from tests.workers import ROOT, RunningWorker
from tools.demo_search import pieces

SERVED = "sealed-model"
LOCAL_KEY = "a-local-key"
SCRIPTS = Path(__file__).parent / "scripts"
CLIENTS = ROOT / ".clients"
SCRIPT_TIMEOUT_S = 240

COMMANDS = {
    "openai_python": [CLIENTS / "openai_python/bin/python", SCRIPTS / "openai_python.py"],
    "openai_node": [CLIENTS / "openai_node/bin/node", SCRIPTS / "openai_node.mjs"],
    "llm_cli": [CLIENTS / "llm/bin/python", SCRIPTS / "llm_cli.py"],
    "langchain_": [CLIENTS / "langchain/bin/python", SCRIPTS / "langchain_.py"],
    "instructor_": [CLIENTS / "instructor/bin/python", SCRIPTS / "instructor_.py"],
    "anthropic_": [CLIENTS / "anthropic/bin/python", SCRIPTS / "anthropic_.py"],
    "open_webui": [Path(sys.executable), SCRIPTS / "open_webui.py"],
}

ANSWERED = {
    "openai_python": [
        *("chat", "chat_streamed", "usage_chunk", "choices", "choices_streamed", "logprobs"),
        *("logprobs_streamed", "stop", "schema", "tool", "tool_streamed", "completion"),
        *("completion_streamed", "responses", "responses_streamed"),
    ],
    "openai_node": [
        *("chat", "chat_streamed", "usage_chunk", "choices", "logprobs", "stop", "schema", "tool"),
        *("tool_streamed", "completion", "responses", "responses_streamed"),
    ],
    "llm_cli": [
        *("whole", "streamed", "system", "template", "schema", "schema_streamed", "completion"),
        *("responses", "endpoint"),
    ],
    "langchain_": [
        *("invoke", "conversation", "stream", "structured_output", "structured_output_by_tool"),
        *("tools", "tools_streamed", "responses"),
    ],
    "instructor_": ["by_schema", "by_tool", "partial"],
    "anthropic_": ["message", "system", "message_streamed", "schema", "tool", "tool_streamed"],
    "open_webui": ["chat", "title", "tags"],
}
"""The scenarios whose answers the native client is asked for as well."""

OTHER = {
    "openai_python": [
        *("models", "unknown_model", "unknown_model_streamed", "too_long", "wrong_key"),
        *("cancelled", "many"),
    ],
    "openai_node": ["models", "unknown_model", "too_long", "wrong_key", "cancelled", "many"],
    "llm_cli": ["usage", "chat", "continued", "endpoint_models", "unknown_model", "cancelled"],
    "langchain_": ["unknown_model", "cancelled", "many"],
    "instructor_": ["unknown_model"],
    "anthropic_": [
        *("count_tokens", "unknown_model", "too_long", "wrong_key", "cancelled", "many"),
    ],
    "open_webui": ["models", "unknown_model", "cancelled", "chat_with_title_and_tags"],
}


def canary(client: str, name: str) -> str:
    """Return what stands in every prompt of a scenario and nowhere else; see harness.prompt."""
    return f"tourmaline-{client}-{name}."


@dataclass(frozen=True)
class Sent:
    """A request of a client, opened with the worker's key, and its job."""

    route: str
    body: dict[str, Any]
    job: Job


class Stage:
    """A worker behind a platform, a gateway before it, and both kinds of clients."""

    def __init__(
        self,
        platform: LocalRunpod,
        worker: RunningWorker,
        gateway: RunningGateway,
        native: Client,
        folder: Path,
    ) -> None:
        self.platform = platform
        self.worker = worker
        self.gateway = gateway
        self.native = native
        self._folder = folder
        self._opener = RequestOpener(
            KeyRing.parse(worker.key), platform.endpoint_id, max_ttl_s=MAX_TTL_S
        )
        self._told: dict[str, dict[str, dict[str, Any]]] = {}
        self._opened: dict[str, tuple[str, str]] = {}
        self._answers: dict[str, Response] = {}

    def run(self, client: str, *names: str) -> dict[str, dict[str, Any]]:
        """Run scenarios of a client and return what each has told."""
        command = COMMANDS[client]
        assert command[0].exists(), f"{command[0]} is missing; run: make clients"
        done = subprocess.run(
            [*command, *names],
            # Nothing of this machine's own settings for any of them.
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self._folder),
                "BASE_URL": f"{self.gateway.url}/v1",
                "API_KEY": LOCAL_KEY,
                "MODEL": SERVED,
            },
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SCRIPT_TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        told = {line.pop("scenario"): line for line in map(json.loads, done.stdout.splitlines())}
        assert told.keys() == set(names), done.stderr[-4000:]
        return told

    def told(self, client: str, name: str) -> dict[str, Any]:
        """Return what a scenario told; all of a client run at once, the first time."""
        if client not in self._told:
            self._told[client] = self.run(client, *ANSWERED[client], *OTHER[client])
        told = self._told[client][name]
        assert "raised" not in told, told["where"]
        return told

    def sent(self, client: str, name: str) -> list[Sent]:
        """Return the requests of a scenario, oldest first."""
        jobs = self.platform.jobs
        for job_id in jobs.keys() - self._opened.keys():
            request = self._opener.open(jobs[job_id].input["sealed"]).request
            self._opened[job_id] = request.route, bytes(request.body).decode()
        own = {response.job_id for response in self._answers.values()}
        found = [
            Sent(self._opened[job_id][0], json.loads(self._opened[job_id][1]), job)
            for job_id, job in jobs.items()
            if canary(client, name) in self._opened[job_id][1] and job_id not in own
        ]
        assert found, f"no job of {client} {name}"
        return found

    def answer(self, sent: Sent) -> Response:
        """Ask the worker the same with the native client, once, and return its answer."""
        if sent.job.id not in self._answers:
            body = {key: item for key, item in sent.body.items() if key != "stream_options"}
            self._answers[sent.job.id] = self.native.request(
                sent.route, body, stream=False, check=False
            )
        return self._answers[sent.job.id]

    def says(self, sent: Sent) -> dict[str, Any]:
        """Return what the worker says to the native client when it is asked the same."""
        response = self.answer(sent)
        assert response.status == 200, response.body
        return READERS[sent.route](response.json())

    def refusal(self, sent: Sent) -> RequestError:
        """Return what the worker has against the request."""
        error = self.answer(sent).error()
        assert error is not None
        return error


def read_chat(body: dict[str, Any]) -> dict[str, Any]:
    choices = [
        {
            "text": choice["message"]["content"] or "",
            "tools": [
                [call["function"]["name"], call["function"]["arguments"]]
                for call in choice["message"].get("tool_calls") or []
            ],
            "finish": choice["finish_reason"],
        }
        for choice in body["choices"]
    ]
    usage = {"in": body["usage"]["prompt_tokens"], "out": body["usage"]["completion_tokens"]}
    return {"choices": choices, "usage": usage, **choices[0]}


def read_completion(body: dict[str, Any]) -> dict[str, Any]:
    choices = [{"text": c["text"], "finish": c["finish_reason"]} for c in body["choices"]]
    return {"choices": choices, **choices[0]}


def read_response(body: dict[str, Any]) -> dict[str, Any]:
    parts = [part for item in body["output"] for part in item["content"]]
    return {"text": "".join(part["text"] for part in parts), "status": body["status"]}


def read_message(body: dict[str, Any]) -> dict[str, Any]:
    blocks = body["content"]
    return {
        "text": "".join(block["text"] for block in blocks if block["type"] == "text"),
        "tools": [[b["name"], b["input"]] for b in blocks if b["type"] == "tool_use"],
        "finish": body["stop_reason"],
        "output_tokens": body["usage"]["output_tokens"],
    }


READERS = {
    "/v1/chat/completions": read_chat,
    "/v1/completions": read_completion,
    "/v1/responses": read_response,
    "/v1/messages": read_message,
}


@contextlib.contextmanager
def staged(folder: Path, **settings: Any) -> Iterator[Stage]:
    """Start a stage whose worker has these settings."""
    with (
        LocalRunpod(record_bytes=500_000_000) as platform,
        RunningWorker(platform, folder, SERVED_MODEL_NAME=SERVED, **settings) as worker,
    ):
        worker.ready()
        own = ClientSettings(platform.endpoint_id, platform.api_key, worker.key, platform.base_url)
        environ = {
            "RUNPOD_ENDPOINT_ID": own.endpoint_id,
            "RUNPOD_API_KEY": own.api_key,
            "RUNPOD_API_BASE": own.api_base,
            "ENCRYPTION_KEY": own.encryption_key,
        }
        with (
            RunningGateway(environ, folder / "gateway", GATEWAY_KEY=LOCAL_KEY) as gateway,
            Client(own) as native,
        ):
            yield Stage(platform, worker, gateway, native, folder)


WINDOW = 12
"""Characters of a text that are looked for at a time; fewer could turn up by chance."""


def readable(texts: set[str], carried: bytes) -> list[bytes]:
    """Return the pieces of texts that carried bytes hold in the clear, as JSON or as base64."""
    wanted = {piece for text in texts for piece in pieces(text, WINDOW)}
    return [
        carried[at : at + WINDOW]
        for at in range(len(carried) - WINDOW + 1)
        if carried[at : at + WINDOW] in wanted
    ]


def carried_by(platform: LocalRunpod) -> bytes:
    """Return all that crossed the platform."""
    assert not platform.exchanged_lost, "the record was too short"
    return b"\n".join(each.path.encode() + b"\n" + each.body for each in platform.exchanged)
