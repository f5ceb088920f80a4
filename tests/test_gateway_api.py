"""`/api/chat` and the admin routes, through the whole gateway and echo workers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from local_runpod_queue import Status
from tests.echo import Echo
from tests.gateways import RunningGateway
from tests.wait import until

SAID = "why is the sky blue at noon"
TOKEN = "the-admin's-own"
KEY = "everybody's"


class House:
    """A platform and a gateway in front of it."""

    def __init__(self, echo: Echo, gateway: RunningGateway) -> None:
        self.echo = echo
        self.gateway = gateway
        self.http = gateway.http

    def chat(self, headers: dict[str, str] | None = None, **body: Any) -> httpx2.Response:
        """Call /api/chat."""
        return self.http.post("/api/chat", json=body, headers=self._key(headers))

    def admin(
        self, method: str, path: str, *, token: str = TOKEN, content: bytes | None = None
    ) -> httpx2.Response:
        """Call an admin route."""
        headers = {"authorization": f"Bearer {token}"}
        return self.http.request(method, f"/admin{path}", headers=headers, content=content)

    @staticmethod
    def _key(headers: dict[str, str] | None) -> dict[str, str]:
        return {"authorization": f"Bearer {KEY}", **(headers or {})}

    def waiting(self) -> str:
        """Wait until one job is in the queue and return its id."""

        def queued() -> list[str]:
            jobs = self.echo.platform.jobs.items()
            return [name for name, job in jobs if job.status is Status.IN_QUEUE]

        until(lambda: len(queued()) == 1, 10, "one job in the queue")
        return queued()[0]


def start(folder: Path, workers: int, **settings: str) -> Iterator[House]:
    """Start a platform and a gateway."""
    with (
        Echo(folder, workers=workers) as echo,
        RunningGateway(echo.environ, folder / "gateway", **settings) as gateway,
    ):
        yield House(echo, gateway)
        assert SAID.encode() not in echo.carried
        assert SAID not in gateway.log
        assert "unexpected" not in gateway.log


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One with a worker."""
    folder = tmp_path_factory.mktemp("house")
    yield from start(folder, 1, GATEWAY_KEY=KEY, GATEWAY_ADMIN_TOKEN=TOKEN)


@pytest.fixture
def asleep(tmp_path: Path) -> Iterator[House]:
    """One without a worker, until a test starts it."""
    yield from start(tmp_path, 0, GATEWAY_KEY=KEY, GATEWAY_ADMIN_TOKEN=TOKEN)


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    """Return the data of a stream's events."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.splitlines() if line and not line.startswith(":")]
    assert all(line.startswith("data: {") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# /api/chat


def test_a_message_is_answered(house: House) -> None:
    response = house.chat(message=SAID)
    answer = response.json()
    assert response.status_code == 200
    assert answer.keys() == {"text", "usage", "job_id", "request_id"}
    assert answer["text"] == SAID
    assert answer["usage"]["completion_tokens"] == len(SAID.split())
    assert answer["job_id"] in house.echo.platform.jobs
    assert response.headers["x-request-id"] == answer["request_id"]
    assert response.headers["x-job-id"] == answer["job_id"]


def test_the_conversation_before_it_comes_first(house: House) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    answer = house.chat(message=SAID, history=history, model="echo").json()
    assert answer["text"] == f"Be brief. / Hi / Hello / {SAID}"


@pytest.mark.parametrize(
    ("headers", "body"),
    [({}, {"stream": True}), ({"accept": "text/event-stream"}, {})],
    ids=["stream", "accept"],
)
def test_the_answer_comes_in_pieces_when_asked(
    house: House, headers: dict[str, str], body: dict[str, Any]
) -> None:
    response = house.chat(headers, message=SAID, **body)
    *pieces, last = events(response)
    assert "".join(piece.pop("text") for piece in pieces) == SAID
    assert not any(pieces)
    assert last.keys() == {"done", "usage"}
    assert last["done"] is True
    assert last["usage"]["completion_tokens"] == len(SAID.split())
    assert response.headers["x-job-id"] in house.echo.platform.jobs


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"message": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not"),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `message`"),
        (b'{"message": 1}', "message"),
        (b'{"message": "a", "temperature": 1}', "temperature"),
        (b'{"message": "a", "stream": "yes"}', "stream"),
        (b'{"message": "a", "model": 1}', "model"),
        (b'{"message": "a", "history": "b"}', "history"),
        (b'{"message": "a", "history": [{"role": "user"}]}', "content"),
        (b'{"message": "a", "history": [{"role": "tool", "content": "b"}]}', "role"),
        (b'{"message": "a", "history": [{"role": "user", "content": "b", "x": 1}]}', "`x`"),
    ],
)
def test_a_body_that_is_not_as_it_should_be_is_an_error(
    house: House, content: bytes, words: str
) -> None:
    with house.echo.watch("run") as run:
        headers = {"authorization": f"Bearer {KEY}"}
        response = house.http.post("/api/chat", content=content, headers=headers)
        assert not run.seen
    error = response.json()["error"]
    assert response.status_code == 400
    assert error.keys() == {"message", "type", "param", "code"}
    assert words in error["message"]


def test_other_methods_and_missing_keys_are_refused(house: House) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    assert house.http.get("/api/chat", headers=headers).status_code == 405
    assert house.chat({"authorization": f"Bearer {TOKEN}"}, message=SAID).status_code == 401


def test_an_error_of_the_platform_keeps_its_status(house: House) -> None:
    with house.echo.fault("run", status=401):
        for stream in (False, True):
            response = house.chat(message=SAID, stream=stream)
            assert response.status_code == 401
            assert "RUNPOD_API_KEY" in response.json()["error"]["message"]


def test_it_is_counted_without_content(house: House) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    house.chat(message=SAID)
    told = house.http.get("/metrics", headers=headers).text
    assert 'gateway_requests_total{route="/api/chat",status="200"}' in told
    recent = house.http.get("/api/status", headers=headers).text
    assert '"/api/chat"' in recent
    assert SAID not in told + recent


def test_a_client_waits_for_a_worker_and_gets_its_answer(asleep: House) -> None:
    with asleep.http.stream(
        "POST",
        "/api/chat",
        json={"message": SAID, "stream": True},
        headers={"authorization": f"Bearer {KEY}"},
    ) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith(": ")
        asleep.echo.start("pod-1")
        rest = [json.loads(line.removeprefix("data: ")) for line in lines if line[:4] == "data"]
    assert "".join(piece.get("text", "") for piece in rest) == SAID
    assert rest[-1]["done"]


def test_a_stream_that_ends_early_ends_with_an_error(asleep: House) -> None:
    with asleep.http.stream(
        "POST",
        "/api/chat",
        json={"message": SAID, "stream": True},
        headers={"authorization": f"Bearer {KEY}"},
    ) as response:
        lines = response.iter_lines()
        assert next(lines).startswith(": ")
        told = asleep.admin("POST", f"/cancel/{response.headers['x-job-id']}")
        assert told.status_code == 200
        said = [json.loads(line.removeprefix("data: ")) for line in lines if line[:4] == "data"]
    assert [each.keys() for each in said] == [{"error"}]
    assert said[0]["error"]["code"] == "job_cancelled"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_job(asleep: House, stream: bool) -> None:
    with httpx2.Client(base_url=asleep.gateway.url) as http:
        headers = {"authorization": f"Bearer {KEY}"}
        body = {"message": SAID, "stream": stream}
        with pytest.raises(httpx2.ReadTimeout):
            http.post("/api/chat", json=body, headers=headers, timeout=httpx2.Timeout(10, read=0.5))
    asleep.echo.until_cancelled(asleep.echo.last_job().id, worker_too=False)


def test_a_client_that_leaves_a_stream_cancels_its_job(asleep: House) -> None:
    with asleep.http.stream(
        "POST",
        "/api/chat",
        json={"message": SAID, "stream": True},
        headers={"authorization": f"Bearer {KEY}"},
    ) as response:
        assert next(response.iter_lines()).startswith(": ")
    asleep.echo.until_cancelled(response.headers["x-job-id"], worker_too=False)


# /admin

ADMIN = [
    ("GET", "/status"),
    ("POST", "/purge-queue"),
    ("POST", "/cancel/some-job"),
    ("POST", "/warm"),
    ("GET", "/nosuch"),
]


@pytest.mark.parametrize(("method", "path"), ADMIN)
@pytest.mark.parametrize("token", ["", KEY, TOKEN + "x", TOKEN[:-1]])
def test_the_admin_routes_want_their_own_token(
    house: House, method: str, path: str, token: str
) -> None:
    with house.echo.watch("run") as run, house.echo.watch("purge-queue") as purge:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        response = house.http.request(method, f"/admin{path}", headers=headers)
        assert not run.seen and not purge.seen
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_admin_token"
    assert TOKEN not in response.text


def test_without_a_token_there_are_no_admin_routes(tmp_path: Path) -> None:
    for off in start(tmp_path, 0):
        for method, path in ADMIN:
            for token in ("x", TOKEN):
                response = off.admin(method, path, token=token)
                assert response.status_code == 404
                assert "GATEWAY_ADMIN_TOKEN" in response.json()["error"]["message"]
        assert off.http.post("/admin/warm").status_code == 404


def test_the_status_tells_platform_models_and_requests(house: House) -> None:
    house.chat(message=SAID)
    response = house.admin("GET", "/status")
    told = response.json()
    assert told["platform"]["workers"]["idle"] == 1
    assert told["platform"]["jobs"]["completed"] >= 1
    assert told["endpoint"] == house.echo.platform.endpoint_id
    assert told["models"] == ["echo"]
    assert told["requests"][0]["route"] == "/api/chat"
    assert SAID not in response.text
    assert house.echo.key not in response.text and house.echo.platform.api_key not in response.text


def test_what_is_no_admin_route_says_which_there_are(house: House) -> None:
    for method, path in (("GET", "/nosuch"), ("GET", "/warm"), ("POST", "/status")):
        response = house.admin(method, path)
        assert response.status_code == 404
        assert "/admin/purge-queue" in response.json()["error"]["message"]


def test_purging_removes_what_no_worker_has_taken(asleep: House) -> None:
    asked = {"message": SAID, "stream": True}
    headers = {"authorization": f"Bearer {KEY}"}
    with asleep.http.stream("POST", "/api/chat", json=asked, headers=headers) as response:
        assert asleep.waiting() == response.headers["x-job-id"]
        assert asleep.admin("POST", "/purge-queue").json()["removed"] == 1
        said = [line for line in response.iter_lines() if line.startswith("data")]
    assert "error" in json.loads(said[-1].removeprefix("data: "))


def test_cancelling_an_unknown_job_says_so(house: House) -> None:
    response = house.admin("POST", "/cancel/nosuch")
    assert response.status_code == 404
    assert "no such job" in response.json()["error"]["message"]


def test_warming_a_worker_that_is_awake_is_quick(house: House) -> None:
    told = house.admin("POST", "/warm").json()
    assert told["awake"] is True
    assert 0 <= told["took_s"] < 10


def test_warming_waits_no_longer_than_asked_and_leaves_its_job(asleep: House) -> None:
    for wait_s in (0, 0.2):
        told = asleep.admin("POST", "/warm", content=json.dumps({"wait_s": wait_s}).encode())
        assert told.json()["awake"] is False
        assert wait_s <= told.json()["took_s"] < wait_s + 2
    # Asked again, it waits for the same job, which is what makes the platform start a worker.
    job_id = asleep.waiting()
    asleep.echo.start("pod-1")
    assert asleep.admin("POST", "/warm", content=b'{"wait_s": 60}').json()["awake"] is True
    asleep.echo.until_completed(job_id)
    assert asleep.admin("POST", "/warm").json()["awake"] is True


def test_a_worker_that_cannot_be_started_is_an_error(asleep: House) -> None:
    with asleep.echo.fault("run", status=402):
        response = asleep.admin("POST", "/warm")
    assert response.status_code >= 400
    assert "402" in response.json()["error"]["message"]
    # The next one tries again.
    assert asleep.admin("POST", "/warm", content=b'{"wait_s": 0}').json()["awake"] is False
    asleep.waiting()


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"wait_s": "x"}', b'{"wait_s": -1}', b'{"wait": 1}', b"\xff"]
)
def test_a_wish_that_is_not_as_it_should_be_is_an_error(house: House, content: bytes) -> None:
    with house.echo.watch("run") as run:
        assert house.admin("POST", "/warm", content=content).status_code == 400
        assert not run.seen


def test_a_gateway_that_ends_while_it_warms_cancels_the_job(asleep: House) -> None:
    asleep.admin("POST", "/warm", content=b'{"wait_s": 0}')
    job_id = asleep.waiting()
    assert asleep.gateway.stop() == 0
    asleep.echo.until_cancelled(job_id, worker_too=False)
    assert "Traceback" not in asleep.gateway.log
