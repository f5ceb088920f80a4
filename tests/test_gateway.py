"""The gateway as a process, against the local platform and echo workers on the real SDK."""

import asyncio
import base64
import contextlib
import json
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

import gateway_reply
from client_config import ClientSettings
from errors import ConfigError, NoWorker
from gateway import warning
from gateway_config import GatewaySettings
from gateway_errors import error_body
from gateway_guard import Guard
from gateway_metrics import Metrics
from gateway_relay import route_of
from keys import generate_key
from local_runpod_queue import Status
from protocol import ROUTES
from tests.echo import Echo
from tests.gateways import RunningGateway
from tests.wait import until

CHAT = "/v1/chat/completions"
WORDS = "one two three four five"

Start = Callable[..., RunningGateway]


def chat(text: str = WORDS, **members: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **members}


def events(answer: httpx2.Response) -> list[str]:
    """Return the events of a stream, comments left out."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [part for part in answer.text.split("\n\n") if part and not part.startswith(":")]


def said(parts: list[str]) -> str:
    """Return the text that streamed events hold, up to `[DONE]`."""
    assert parts[-1] == "data: [DONE]"
    chunks = [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]
    return "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Echo]:
    with Echo(tmp_path_factory.mktemp("echo")) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(echo: Echo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with RunningGateway(echo.environ, tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.fixture
def start(echo: Echo, tmp_path: Path) -> Iterator[Start]:
    """Start a gateway with other settings."""
    with contextlib.ExitStack() as stack:

        def begin(**settings: str) -> RunningGateway:
            running = RunningGateway({**echo.environ, **settings}, tmp_path / "other")
            return stack.enter_context(running)

        yield begin


class TestAnswers:
    def test_whole(self, gateway: RunningGateway) -> None:
        answer = gateway.http.post(CHAT, json=chat())
        assert answer.status_code == 200
        assert answer.json() == {"echo": WORDS}
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-should-retry"] == "false"
        assert len(answer.headers["x-request-id"]) == 32

    def test_streamed(self, gateway: RunningGateway, echo: Echo) -> None:
        answer = gateway.http.post(CHAT, json=chat(stream=True))
        assert said(events(answer)) == WORDS + " "
        assert answer.headers["x-job-id"] == echo.last_job().id

    @pytest.mark.parametrize("path", ["/chat/completions", "/v1/v1/chat/completions"])
    def test_other_spellings_of_a_path(self, gateway: RunningGateway, path: str) -> None:
        assert gateway.http.post(path, json=chat()).json() == {"echo": WORDS}

    def test_every_route_is_reached_with_and_without_v1(self) -> None:
        for route in ROUTES:
            assert route_of(route) == route
            short = route.removeprefix("/v1")
            assert route_of(short) in (route, short)
            assert route_of(short + "/") == route_of(short)
        assert route_of("/v1/tokenize") == "/tokenize"
        assert route_of("/v1/audio") is None

    def test_an_error_of_the_worker_comes_as_it_is(self, gateway: RunningGateway) -> None:
        answer = gateway.http.post("/v1/embeddings", json={"model": "echo", "input": "x"})
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "no such route"

    def test_many_at_once(self, gateway: RunningGateway) -> None:
        def ask(number: int) -> str:
            text = f"{WORDS} {number}"
            return said(events(gateway.http.post(CHAT, json=chat(text, stream=True))))

        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(ask, range(32)))
        assert answers == [f"{WORDS} {number} " for number in range(32)]

    def test_numbers_and_spaces_pass_as_they_came(self, gateway: RunningGateway) -> None:
        body = b'{ "messages": [{"role": "user", "content": "x"}], "n": 1e0,"seed":12345678901 }'
        assert gateway.http.post(CHAT, content=body).json() == {"echo": "x"}


class TestBadInput:
    @pytest.mark.parametrize(
        ("method", "path", "content", "status", "told"),
        [
            ("POST", CHAT, b"{", 400, "not valid JSON"),
            ("POST", CHAT, b"", 400, "not valid JSON"),
            ("POST", CHAT, b"[]", 400, "Expected `object`"),
            ("POST", CHAT, b'{"x": "\xff"}', 400, "not valid JSON"),
            ("POST", CHAT, b'{"x": ' + b"[" * 100_000, 400, "not valid JSON"),
            ("GET", CHAT, b"", 405, "called with POST"),
            ("POST", "/v1/audio/speech", b"{}", 404, "no such path"),
            ("GET", "/nothing", b"", 404, "no such path"),
            ("GET", "/v1/models/none", b"", 404, "no such model"),
        ],
    )
    def test_costs_no_job(
        self,
        gateway: RunningGateway,
        echo: Echo,
        method: str,
        path: str,
        content: bytes,
        status: int,
        told: str,
    ) -> None:
        before = len(echo.platform.jobs)
        answer = gateway.http.request(method, path, content=content)
        error = answer.json()["error"]
        assert (answer.status_code, error.keys()) == (status, {"message", "type", "param", "code"})
        assert told in error["message"]
        assert len(echo.platform.jobs) == before

    def test_too_large(self, start: Start, echo: Echo) -> None:
        gateway = start(GATEWAY_MAX_BODY_BYTES="1000")
        before = len(echo.platform.jobs)

        def pieces() -> Iterator[bytes]:
            for _ in range(20):
                yield b"x" * 100

        for content in (b"x" * 1001, pieces()):
            answer = gateway.http.post(CHAT, content=content)
            assert answer.status_code == 413
            assert "GATEWAY_MAX_BODY_BYTES" in answer.json()["error"]["message"]
        assert gateway.http.post(CHAT, json=chat()).status_code == 200
        assert len(echo.platform.jobs) == before + 1

    def test_in_anthropic_s_form_on_its_route(self, gateway: RunningGateway) -> None:
        answer = gateway.http.post("/v1/messages", content=b"{")
        assert answer.status_code == 400
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert error_body(NoWorker("asleep"), "/v1/messages") == {
            "type": "error",
            "error": {"type": "overloaded_error", "message": "asleep"},
        }

    def test_a_job_that_cannot_be(self, start: Start, echo: Echo) -> None:
        """Each fault of the endpoint: its status, its code, and what to do about it."""
        cases = [
            ({"RUNPOD_API_KEY": "wrong"}, 401, "wrong_api_key", "RUNPOD_API_KEY"),
            ({"RUNPOD_ENDPOINT_ID": "other"}, 404, "endpoint_not_found", "RUNPOD_ENDPOINT_ID"),
            ({"ENCRYPTION_KEY": generate_key()}, 403, "rejected", "ENCRYPTION_KEY"),
            (
                {"RUNPOD_API_BASE": "http://127.0.0.1:9/v2"},
                502,
                "unreachable",
                "RUNPOD_API_BASE",
            ),
        ]
        for settings, status, code, told in cases:
            gateway = start(**settings)
            for stream in (False, True):
                answer = gateway.http.post(CHAT, json=chat(stream=stream))
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (status, code)
                assert told in error["message"]
                assert answer.headers["x-should-retry"] == "false"
            assert gateway.http.get("/health").status_code == 200

    def test_what_was_a_job_is_not_tried_again(self, start: Start, echo: Echo) -> None:
        gateway = start(CLIENT_TIMEOUT_S="0.5")
        with echo.fault("run", status=429):
            answer = gateway.http.post(CHAT, json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limited")
        assert "x-should-retry" not in answer.headers
        answer = gateway.http.post(CHAT, json=chat(behaviour="hang"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "job_timed_out")
        assert answer.headers["x-should-retry"] == "false"

    def test_a_workers_own_limit_says_when_to_come_again(self, start: Start) -> None:
        gateway = start()
        for stream in (False, True):
            answer = gateway.http.post(CHAT, json=chat(behaviour="limited", stream=stream))
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (429, "rate_limit_exceeded")
            assert error["retry_after_s"] == 7
            assert answer.headers["retry-after"] == "7"
            assert "x-should-retry" not in answer.headers


class TestForms:
    """What OpenAI's clients send as a form."""

    ROUTE = "/v1/audio/transcriptions"

    def test_a_recording_travels_as_json(self, gateway: RunningGateway) -> None:
        audio = bytes(range(256)) * 8000  # more than a form's parser would keep in memory
        form = {"model": "w", "stream": "false", "timestamp_granularities[]": ["word", "segment"]}
        answer = gateway.http.post(
            self.ROUTE, files={"file": ("a.wav", audio, "audio/wav")}, data=form
        )
        assert answer.status_code == 200
        body = answer.json()["text"]
        assert body.pop("file") == "data:audio/wav;base64," + base64.b64encode(audio).decode()
        assert body == {**form, "stream": False}

    def test_one_value_of_a_list_stays_a_list(self, gateway: RunningGateway) -> None:
        answer = gateway.http.post(
            self.ROUTE, files={"file": b"x"}, data={"timestamp_granularities[]": "word"}
        )
        assert answer.json()["text"]["timestamp_granularities[]"] == ["word"]

    def test_a_damaged_form_is_refused(self, gateway: RunningGateway) -> None:
        for kind in ("multipart/form-data", "multipart/form-data; boundary=b"):
            answer = gateway.http.post(
                self.ROUTE, content=b"no form", headers={"content-type": kind}
            )
            assert answer.status_code == 400
            assert "the form is damaged" in answer.json()["error"]["message"]


class TestCold:
    def test_a_client_sees_it_wait(self, tmp_path: Path) -> None:
        with (
            Echo(tmp_path, workers=0) as echo,
            RunningGateway(echo.environ, tmp_path / "gateway", GATEWAY_MODELS="later") as gateway,
        ):
            assert "asleep" in gateway.banner
            assert gateway.http.get("/ready").status_code == 503
            listed = gateway.http.get("/v1/models").json()["data"]
            assert [model["id"] for model in listed] == ["later"]
            assert not echo.platform.jobs, "asking for the models must wake nobody"
            with (
                ThreadPoolExecutor(1) as pool,
                gateway.http.stream("POST", CHAT, json=chat(stream=True)) as answer,
            ):
                whole = pool.submit(gateway.http.post, CHAT, json=chat())
                lines = answer.iter_lines()
                assert next(lines) == ": waiting for the worker"
                assert answer.status_code == 200
                echo.start("pod-1")
                rest = [line for line in lines if line and not line.startswith(":")]
                assert said(rest) == WORDS + " "
                assert whole.result().json() == {"echo": WORDS}
            until(lambda: "echo" in gateway.http.get("/v1/models").text, 20, "the models")
            assert gateway.http.get("/ready").json()["ready"] is True

    def test_a_client_is_told_what_the_worker_says_of_the_wait(
        self, gateway: RunningGateway
    ) -> None:
        body = chat(stream=True, notes=["loading model\norg/name"], before="hang")
        with gateway.http.stream("POST", CHAT, json=body) as answer:
            words = (line for line in answer.iter_lines() if line)
            assert (
                next(line for line in words if "waiting" not in line) == ": loading model org/name"
            )

    def test_nobody_takes_the_job(self, tmp_path: Path) -> None:
        settings = {"CLIENT_WAIT_S": "0.1"}
        with (
            Echo(tmp_path, workers=0) as echo,
            RunningGateway(echo.environ, tmp_path / "gateway", **settings) as gateway,
        ):
            for stream in (False, True):
                answer = gateway.http.post(CHAT, json=chat(stream=stream))
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "no_worker"
                assert "longer wait" in answer.json()["error"]["message"]
            job = echo.last_job()
            until(lambda: job.status == "CANCELLED", 10, "the job cancelled")

    def test_too_late_for_a_status_it_is_an_event(self, tmp_path: Path) -> None:
        settings = {"CLIENT_WAIT_S": "2.5"}
        with (
            Echo(tmp_path, workers=0) as echo,
            RunningGateway(echo.environ, tmp_path / "gateway", **settings) as gateway,
        ):
            answer = gateway.http.post(CHAT, json=chat(stream=True))
            assert answer.status_code == 200
            (only,) = events(answer)
            assert json.loads(only.removeprefix("data: "))["error"]["code"] == "no_worker"


class TestLeaving:
    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_goes_away_takes_its_job_with_it(
        self, gateway: RunningGateway, echo: Echo, stream: bool
    ) -> None:
        body = json.dumps(chat(stream=stream, behaviour="hang")).encode()
        before = len(echo.platform.jobs)
        address = httpx2.URL(gateway.url)
        with socket.create_connection((address.host, address.port)) as peer:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {address.host}\r\nContent-Length: {len(body)}"
            peer.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: len(echo.platform.jobs) > before, 10, "the job")
            job = echo.last_job()
            echo.until_hanging(job.id)
        echo.until_cancelled(job.id)

    @pytest.mark.parametrize("stream", [True, False])
    def test_an_end_of_the_gateway_ends_what_runs_and_says_so(
        self, start: Start, echo: Echo, stream: bool
    ) -> None:
        gateway = start()
        before = len(echo.platform.jobs)
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(gateway.http.post, CHAT, json=chat(stream=stream, behaviour="hang"))
            until(lambda: len(echo.platform.jobs) > before, 10, "the job")
            job = echo.last_job()
            echo.until_hanging(job.id)
            gateway.process.send_signal(signal.SIGTERM)
            answer = asked.result(30)
        assert gateway.process.wait(30) == 0
        assert echo.platform.jobs[job.id].status is Status.CANCELLED
        if stream:
            told = json.loads(events(answer)[-1].removeprefix("data: "))
            assert "[DONE]" not in answer.text
        else:
            assert answer.status_code == 503
            assert answer.headers["x-should-retry"] == "false"
            told = answer.json()
        assert told["error"]["code"] == "gateway_stopped"
        assert gateway.log == ""

    def test_an_end_of_the_gateway_lets_what_is_nearly_done_be_done(
        self, start: Start, echo: Echo
    ) -> None:
        gateway = start()
        before = len(echo.platform.jobs)
        with ThreadPoolExecutor() as pool, echo.fault("job-stream", delay_s=1.0):
            asked = pool.submit(gateway.http.post, CHAT, json=chat())
            until(lambda: len(echo.platform.jobs) > before, 10, "the job")
            gateway.process.send_signal(signal.SIGTERM)
            answer = asked.result(30)
        assert answer.status_code == 200
        assert gateway.process.wait(30) == 0

    def test_a_request_that_never_comes_to_its_end_does_not_hold_up_the_gateways(
        self, start: Start
    ) -> None:
        gateway = start()
        address = (gateway.http.base_url.host, gateway.http.base_url.port)
        with socket.create_connection(address) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
                b"content-type: application/json\r\ncontent-length: 100\r\n"
                b"expect: 100-continue\r\n\r\n"
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 100")  # the body is being read
            connection.sendall(b"{")
            gateway.process.send_signal(signal.SIGTERM)
            assert gateway.process.wait(30) == 0

    async def test_nor_does_a_client_that_no_longer_reads(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gateway_reply, "FAREWELL_S", 0.05)
        serving = gateway_reply.Serving(Metrics(), keepalive_s=60, on_answer=lambda: None)
        asked: asyncio.Queue[Any] = asyncio.Queue()
        asked.put_nowait({"type": "http.request", "body": b"{}", "more_body": False})
        begun = asyncio.Event()

        async def never(*_: Any) -> None:
            begun.set()
            await asyncio.Event().wait()

        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        answering = asyncio.create_task(
            serving.serve(scope, asked.get, never, route="x", work=never)
        )
        await begun.wait()
        await asyncio.wait_for(serving.end(0), 10)
        await answering


class TestBrokenStream:
    def test_a_chunk_that_was_lost_is_fetched(self, gateway: RunningGateway, echo: Echo) -> None:
        with echo.fault("job-stream", nth=3, drop=True):
            answer = gateway.http.post(CHAT, json=chat(stream=True))
        assert said(events(answer)) == WORDS + " "

    def test_a_worker_of_another_version(self, gateway: RunningGateway, echo: Echo) -> None:
        def later(body: bytes) -> bytes:
            return body.replace(b'"1.', b'"2.')

        with echo.fault("job-stream", tamper=later):
            answer = gateway.http.post(CHAT, json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "other_version")
        assert "version 2" in answer.json()["error"]["message"]
        assert "same release" in answer.json()["error"]["message"]

    def test_a_chunk_that_was_changed(self, gateway: RunningGateway, echo: Echo) -> None:
        def tamper(body: bytes) -> bytes:
            return body.replace(b"gAAAA", b"gBBBB")

        # Late enough for what came before it to have begun the answer.
        with echo.fault("job-stream", nth=4, delay_s=1.0, tamper=tamper):
            answer = gateway.http.post(CHAT, json=chat(stream=True))
        parts = events(answer)
        assert json.loads(parts[-1].removeprefix("data: "))["error"]["code"] == "tampered_chunk"
        assert "[DONE]" not in answer.text


class TestDoor:
    @pytest.mark.parametrize(
        ("host", "allowed"),
        [
            ("localhost:80", True),
            ("127.0.0.1", True),
            ("[::1]:8000", True),
            ("LOCALHOST", True),
            ("evil.example", False),
            ("evil.example:8000", False),
            ("localhost.evil.example", False),
            ("", False),
            ("[::1", False),
        ],
    )
    def test_only_known_hosts(self, gateway: RunningGateway, host: str, allowed: bool) -> None:
        answer = gateway.http.get("/health", headers={"Host": host})
        assert answer.status_code == (200 if allowed else 403)

    def test_more_hosts_by_name(self, start: Start) -> None:
        gateway = start(GATEWAY_ALLOWED_HOSTS="chat.example, other.example")
        for host, status in (("chat.example", 200), ("Other.Example:1", 200), ("evil", 403)):
            assert gateway.http.get("/health", headers={"Host": host}).status_code == status

    async def test_the_address_that_was_called(self) -> None:
        async def served(scope: Scope, receive: Receive, send: Send) -> None:
            await PlainTextResponse("in")(scope, receive, send)

        guard = Guard(
            served,
            hosts=(),
            origins=(),
            key="",
            max_body_bytes=1,
            open_paths=(),
            own_doors=(),
        )
        transport = httpx2.ASGITransport(app=guard)
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://192.0.2.7:8000"
        ) as client:
            assert (await client.get("/")).status_code == 200
            for host in ("192.0.2.8", "rebound.example", "192.0.2.7.example"):
                assert (await client.get("/", headers={"Host": host})).status_code == 403

    def test_no_web_page_of_another_site(self, gateway: RunningGateway, echo: Echo) -> None:
        before = len(echo.platform.jobs)
        own = gateway.url
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://[::1"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec-Fetch-Site": "cross-site"},
        ):
            answer = gateway.http.post(CHAT, json=chat(), headers=headers)
            assert answer.status_code == 403, headers
            assert answer.json()["error"]["code"] == "origin_not_allowed"
            assert "access-control-allow-origin" not in answer.headers
        assert len(echo.platform.jobs) == before
        same = {"Origin": own, "Sec-Fetch-Site": "same-origin"}
        assert gateway.http.post(CHAT, json=chat(), headers=same).status_code == 200

    def test_pages_that_may(self, start: Start) -> None:
        page = "https://chat.example"
        gateway = start(GATEWAY_CORS_ORIGINS=page, GATEWAY_KEY="local")
        asked = {
            "Origin": page,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = gateway.http.options(CHAT, headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == page
        headers = {"Origin": page, "Authorization": "Bearer local"}
        answer = gateway.http.post(CHAT, json=chat(), headers=headers)
        assert answer.headers["access-control-allow-origin"] == page
        other = {**asked, "Origin": "https://evil.example"}
        assert gateway.http.options(CHAT, headers=other).status_code == 400

    def test_a_key_of_its_own(self, start: Start, tmp_path: Path) -> None:
        file = tmp_path / "key"
        file.touch(0o600)
        file.write_text("local-key\n")
        gateway = start(GATEWAY_KEY_FILE=str(file))
        get = gateway.http.get
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic local-key"},
            {"Authorization": "Bearer local-keys"},
            {"x-api-key": ""},
        ):
            answer = get("/v1/models", headers=headers)
            assert answer.status_code == 401, headers
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert get("/metrics", headers=headers).status_code == 401
            assert get("/api/status", headers=headers).status_code == 401
        for headers in ({"Authorization": "Bearer local-key"}, {"x-api-key": "local-key"}):
            assert get("/v1/models", headers=headers).status_code == 200
        assert get("/health").status_code == 200
        assert "local-key" not in gateway.banner + gateway.log

    def test_a_warning_when_others_can_reach_it(self) -> None:
        client = ClientSettings("id", "key", generate_key())
        assert warning(GatewaySettings(client)) == ""
        assert warning(GatewaySettings(client, host="::1")) == ""
        open_door = warning(GatewaySettings(client, host="0.0.0.0"))
        assert "in the clear" in open_door
        assert "GATEWAY_KEY" in open_door
        assert "GATEWAY_KEY" not in warning(GatewaySettings(client, host="10.0.0.1", key="k"))


class TestTelling:
    def test_the_banner(self, gateway: RunningGateway, echo: Echo) -> None:
        banner = gateway.banner
        assert f"{gateway.url}/v1" in banner
        for word in (echo.platform.endpoint_id, "awake", "sealed-vllm echo", "models    echo"):
            assert word in banner
        assert echo.key not in banner
        assert echo.platform.api_key not in banner

    def test_models(self, gateway: RunningGateway) -> None:
        for path in ("/v1/models", "/models"):
            assert gateway.http.get(path).json() == {"object": "list", "data": [{"id": "echo"}]}
        assert gateway.http.get("/v1/models/echo").json() == {"id": "echo"}

    def test_the_models_outlive_a_restart(self, echo: Echo, tmp_path: Path) -> None:
        state = {"CLIENT_STATE_DIR": str(tmp_path / "state")}
        with RunningGateway({**echo.environ, **state}, tmp_path / "first"):
            pass
        (kept,) = (tmp_path / "state").iterdir()
        asleep = {**echo.environ, **state, "RUNPOD_API_BASE": "http://127.0.0.1:9/v2"}
        with RunningGateway(asleep, tmp_path / "second") as gateway:
            assert gateway.http.get("/v1/models").json()["data"] == [{"id": "echo"}]
        kept.write_text("{")
        with RunningGateway(asleep, tmp_path / "third") as gateway:
            answer = gateway.http.get("/v1/models")
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "unreachable")
        # Another key is another deployment.
        for path, address in (("fourth", asleep), ("fifth", {**echo.environ, **state})):
            other = {**address, "ENCRYPTION_KEY": generate_key()}
            with RunningGateway(other, tmp_path / path) as gateway:
                assert gateway.http.get("/v1/models").status_code != 200

    def test_a_wrong_key_is_told_at_once(self, start: Start) -> None:
        gateway = start(ENCRYPTION_KEY=generate_key())
        assert "awake, but: " in gateway.banner
        assert "ENCRYPTION_KEY" in gateway.banner
        assert "while no worker is awake" not in gateway.banner
        answer = gateway.http.get("/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "rejected")

    def test_ready_needs_a_platform(self, start: Start) -> None:
        gateway = start(RUNPOD_API_BASE="http://127.0.0.1:9/v2")
        assert gateway.http.get("/health").json()["status"] == "ok"
        assert gateway.http.get("/ready").status_code == 502
        assert "unknown" in gateway.banner

    def test_metrics_and_status_count_and_hold_no_content(self, start: Start, echo: Echo) -> None:
        gateway = start()
        canary = "quagga-9137"
        gateway.http.post(CHAT, json=chat(canary, user=canary))
        gateway.http.post(CHAT, json=chat(canary, stream=True))
        gateway.http.post(CHAT, content=f'{{"{canary}": '.encode())
        gateway.http.post(f"/v1/{canary}", json=chat(canary))

        def line(name: str) -> float:
            for text in gateway.http.get("/metrics").text.splitlines():
                if text.startswith(name + " "):
                    return float(text.rpartition(" ")[2])
            return 0

        route = f'route="{CHAT}"'
        assert line(f'gateway_requests_total{{{route},status="200"}}') == 2
        assert line(f'gateway_requests_total{{{route},status="400"}}') == 1
        assert line(f"gateway_request_seconds_count{{{route}}}") == 3
        assert line('gateway_tokens_total{kind="completion"}') == 2
        assert line("gateway_requests_running") == 0
        assert line("gateway_sent_bytes_total") > 100
        status = gateway.http.get("/api/status").json()
        assert [one["status"] for one in status["requests"]] == [400, 200, 200]
        assert (status["endpoint"], status["awake"], status["models"]) == (
            echo.platform.endpoint_id,
            True,
            ["echo"],
        )
        shown = json.dumps(status) + gateway.http.get("/metrics").text
        assert canary not in shown + gateway.banner + gateway.log
        assert canary.encode() not in echo.carried


class TestSettings:
    def test_every_fault_is_named_and_no_value(self, tmp_path: Path) -> None:
        readable = tmp_path / "key"
        readable.write_text("secret-text")
        readable.chmod(0o644)
        environ = {
            "RUNPOD_ENDPOINT_ID": "id",
            "GATEWAY_PORT": "eighty",
            "GATEWAY_KEY_FILE": str(readable),
            "GATEWAY_CORS_ORIGINS": "https://ok.example, *",
            "GATEWAY_MAX_BODY_BYTES": "-1",
            "GATEWAY_MODELS_TTL_S": "soon",
        }
        with pytest.raises(ConfigError) as caught:
            GatewaySettings.from_environ(environ)
        told = str(caught.value)
        for name in (*environ, "RUNPOD_API_KEY", "ENCRYPTION_KEY"):
            assert (name in told) == (name != "RUNPOD_ENDPOINT_ID"), name
        assert "secret-text" not in told
        assert "chmod 600" in told

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"GATEWAY_KEYS": "x"}, "is GATEWAY_KEY meant"),
            ({"GATEWAY_API_KEY": "x"}, "is GATEWAY_KEY meant"),
            ({"GATEWAY_TOKEN": "x"}, "is GATEWAY_KEY meant"),
            ({"GATEWAY_KEY": "a b"}, "GATEWAY_KEY holds blanks"),
            ({"GATEWAY_KEY": "same", "GATEWAY_ADMIN_TOKEN": "same"}, "are the same"),
            ({"GATEWAY_ALLOWED_HOSTS": "https://a.example/"}, "https://a.example/ is not a host"),
            ({"GATEWAY_ALLOWED_HOSTS": "a.example:80"}, "a.example:80 is not a host"),
        ],
    )
    def test_what_would_not_do_what_it_seems_to(
        self, echo: Echo, settings: dict[str, str], told: str
    ) -> None:
        with pytest.raises(ConfigError, match=told):
            GatewaySettings.from_environ({**echo.environ, **settings})

    def test_what_looks_odd_and_is_right(self, echo: Echo) -> None:
        hosts = "*, chat.example, localhost, 192.0.2.7, ::1, fe80::1, a-b.example"
        settings = {"GATEWAY_ALLOWED_HOSTS": hosts, "GATEWAY_URL": "of another program"}
        read = GatewaySettings.from_environ({**echo.environ, **settings})
        assert read.allowed_hosts == tuple(hosts.split(", "))

    def test_a_port_that_is_taken(
        self, gateway: RunningGateway, echo: Echo, tmp_path: Path
    ) -> None:
        port = str(httpx2.URL(gateway.url).port)
        second = RunningGateway({**echo.environ, "GATEWAY_PORT": port}, tmp_path, arguments=())
        assert second.process.wait(30) == ConfigError.exit_code
        assert f"cannot listen on 127.0.0.1:{port}" in second.log

    def test_an_interrupt_ends_it_well(self, start: Start) -> None:
        gateway = start()
        assert gateway.stop() == 0
        assert gateway.log == ""
