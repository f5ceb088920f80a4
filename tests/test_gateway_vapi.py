"""The Vapi webhook over HTTP: who may call it, what it answers, and the voice file behind it."""

import contextlib
import hashlib
import hmac
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers

import gateway_vapi
import gateway_voice
from client_config import Reader
from errors import ConfigError
from gateway_config import VapiSettings
from gateway_vapi import Authentication, routes
from tests.echo import Echo
from tests.gateways import RunningGateway
from tests.wait import until

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "voice.py"
NOW_S = 1_780_000_000.0
SECRET = "the words on the door"
SAID = "a number that only the caller knows"


@contextlib.contextmanager
def serve(settings: VapiSettings, voice: gateway_voice.Voice | None) -> Iterator[str]:
    """Serve the webhook alone, at NOW_S, and yield its address."""
    app = Starlette(routes=routes(settings, voice, now=lambda: NOW_S))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started, 10, "the server")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/vapi/webhook"
    finally:
        server.should_exit = True
        thread.join()


class Line:
    """The webhook with a voice file of the test's own."""

    def __init__(self, url: str) -> None:
        self._url = url

    def tell(self, type_: str, **members: Any) -> Any:
        """Send a message as Vapi does and return the answer's body."""
        body = {"message": {"type": type_, "call": {"id": "c"}, **members}}
        headers = {"x-vapi-secret": SECRET}
        response = httpx2.post(self._url, json=body, headers=headers, timeout=10)
        assert response.status_code == 200, response.text
        return response.json()

    def use(self, *calls: dict[str, Any]) -> list[dict[str, str]]:
        """Send tool calls and return their results."""
        answer = self.tell("tool-calls", toolCallList=list(calls))
        assert answer.keys() == {"results"}
        results: list[dict[str, str]] = answer["results"]
        return results


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Callable[[str], Line]]:
    """Return what starts a webhook with the given voice file."""
    with contextlib.ExitStack() as stack:

        def start(source: str) -> Line:
            settings = VapiSettings(voice_file="voice.py", secret=SECRET)
            voice = gateway_voice.load(write(tmp_path, source))
            return Line(stack.enter_context(serve(settings, voice)))

        yield start


def write(folder: Path, source: str) -> str:
    """Write a voice file and return its path."""
    path = folder / "voice.py"
    path.write_text(source)
    path.chmod(0o644)
    return str(path)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a copy of the example; a checkout may be writable by a group."""
    return write(tmp_path_factory.mktemp("example"), EXAMPLE.read_text())


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    """Return a tool call as it stands in a message's list."""
    return {"id": f"id-{name}", "name": name, "arguments": arguments}


# Who may call.

KEY = "a key to sign with"
BODY = json.dumps({"message": {"type": "status-update", "status": "ended"}}).encode()


def signed(stamp: str, body: bytes = BODY, key: str = KEY) -> dict[str, str]:
    """Return the headers of a signed message."""
    signature = hmac.new(key.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return {"x-signature": signature, "x-timestamp": stamp}


@pytest.fixture(scope="module")
def door(example: str) -> Iterator[Callable[[VapiSettings, dict[str, str], bytes], int]]:
    """Return what knocks: the status for settings, headers and a body."""
    voice = gateway_voice.load(example)
    with contextlib.ExitStack() as stack:
        urls: dict[VapiSettings, str] = {}

        def knock(settings: VapiSettings, headers: dict[str, str], body: bytes = BODY) -> int:
            if settings not in urls:
                urls[settings] = stack.enter_context(serve(settings, voice))
            response = httpx2.post(urls[settings], content=body, headers=headers)
            if response.status_code != 200:
                error = response.json()["error"]
                assert error["message"] and SECRET not in response.text and KEY not in response.text
            return response.status_code

        yield knock


TOKEN_ONLY = VapiSettings(token=SECRET)
SECRET_ONLY = VapiSettings(secret=SECRET)
HMAC_ONLY = VapiSettings(hmac_key=KEY)
ALL = VapiSettings(token="token", secret=SECRET, hmac_key=KEY)
stamp = str(int(NOW_S))


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        (TOKEN_ONLY, {"authorization": f"Bearer {SECRET}"}, 200),
        (TOKEN_ONLY, {"authorization": f"bearer {SECRET}"}, 200),
        (TOKEN_ONLY, {"authorization": f"Bearer {SECRET}!"}, 401),
        (TOKEN_ONLY, {"authorization": "Bearer"}, 401),
        (TOKEN_ONLY, {"authorization": f"Basic {SECRET}"}, 401),
        (TOKEN_ONLY, {"authorization": SECRET}, 401),
        (TOKEN_ONLY, {"x-vapi-secret": SECRET}, 401),
        (TOKEN_ONLY, {"x-vapi-secret": ""}, 401),
        (TOKEN_ONLY, signed(stamp, key=""), 401),
        (TOKEN_ONLY, {}, 401),
        (SECRET_ONLY, {"x-vapi-secret": SECRET}, 200),
        (SECRET_ONLY, {"x-vapi-secret": SECRET.upper()}, 401),
        (SECRET_ONLY, {"authorization": f"Bearer {SECRET}"}, 401),
        (SECRET_ONLY, {"x-vapi-secret": "caf\xe9"}, 401),
        (HMAC_ONLY, signed(stamp, key=SECRET), 401),
        (HMAC_ONLY, {**signed(stamp), "x-timestamp": str(int(NOW_S) + 1)}, 401),
        (HMAC_ONLY, {**signed(stamp), "x-signature": ""}, 401),
        (HMAC_ONLY, {"x-signature": signed(stamp)["x-signature"]}, 401),
        (HMAC_ONLY, {"x-timestamp": stamp}, 401),
        (HMAC_ONLY, signed("now"), 401),
        (HMAC_ONLY, signed(""), 401),
        (HMAC_ONLY, signed("9" * 400), 401),
        (HMAC_ONLY, signed("-1"), 401),
        (HMAC_ONLY, {"authorization": f"Bearer {KEY}"}, 401),
        (HMAC_ONLY, {"x-vapi-secret": KEY}, 401),
        (ALL, {"authorization": "Bearer token"}, 200),
        (ALL, {"x-vapi-secret": SECRET}, 200),
        (ALL, signed(stamp), 200),
        (ALL, {"authorization": f"Bearer {SECRET}", "x-vapi-secret": "token"}, 401),
        (ALL, {}, 401),
    ],
)
def test_vapi_is_known_by_what_is_configured(
    door: Any, settings: VapiSettings, headers: dict[str, str], status: int
) -> None:
    given = {name: value.encode("latin-1") for name, value in headers.items()}
    assert door(settings, given, BODY) == status


def test_a_signed_message_is_taken_once(door: Any) -> None:
    headers = signed(str(int(NOW_S) - 7))
    assert door(HMAC_ONLY, headers, BODY) == 200
    assert door(HMAC_ONLY, headers, BODY) == 401
    # Neither another spelling of the signature nor a wrong one in between makes it new.
    other = {**headers, "x-signature": "sha256=" + headers["x-signature"].upper()}
    assert door(HMAC_ONLY, other, BODY) == 401
    assert door(HMAC_ONLY, {**headers, "x-signature": "0" * 64}, BODY) == 401
    assert door(HMAC_ONLY, headers, BODY) == 401


def test_the_signature_covers_every_byte_of_the_body(door: Any) -> None:
    headers = signed(str(int(NOW_S) - 8))
    assert door(HMAC_ONLY, headers, BODY + b" ") == 401
    assert door(HMAC_ONLY, headers, BODY.replace(b"ended", b"begun")) == 401
    assert door(HMAC_ONLY, headers, BODY) == 200


@pytest.mark.parametrize(
    ("age_s", "status"), [(0, 200), (299, 200), (-299, 200), (301, 401), (-301, 401), (1e9, 401)]
)
@pytest.mark.parametrize("unit", [1, 1000], ids=["s", "ms"])
def test_a_signed_message_must_be_of_now(door: Any, age_s: float, status: int, unit: int) -> None:
    # The body differs, so that no message is taken for a repetition of another.
    body = json.dumps({"message": {"type": f"at-{age_s}-{unit}"}}).encode()
    headers = signed(str(int((NOW_S - age_s) * unit)), body)
    assert door(HMAC_ONLY, headers, body) == status


def test_a_repetition_is_refused_as_long_as_its_time_would_pass() -> None:
    clock = [NOW_S]
    authentication = Authentication(HMAC_ONLY, now=lambda: clock[0])
    headers = Headers(signed(str(int(NOW_S) + 299)))
    assert authentication.by_signature(headers, BODY)
    for later_s in (0, 298, 300, 598, 599, 600, 10_000):
        clock[0] = NOW_S + later_s
        assert not authentication.by_signature(headers, BODY), later_s
    # What is too old anyway is not remembered.
    assert authentication.by_signature(Headers(signed(str(int(clock[0])))), BODY)
    assert len(authentication._seen) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "one of Vapi's messages"),
        (b"{}", "one of Vapi's messages"),
        (b'{"message": {}}', "one of Vapi's messages"),
        (b'{"message": {"type": 1}}', "one of Vapi's messages"),
        (b'{"message": {"type": "tool-calls"}}', "list of tool calls"),
        (b'{"message": {"type": "tool-calls", "toolCallList": 1}}', "list of tool calls"),
    ],
)
def test_what_is_no_message_is_an_error(example: str, body: bytes, words: str) -> None:
    with serve(SECRET_ONLY, gateway_voice.load(example)) as url:
        answer = httpx2.post(url, content=body, headers={"x-vapi-secret": SECRET})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("on", [True, False])
def test_without_a_secret_there_is_no_webhook(example: str, on: bool) -> None:
    settings = SECRET_ONLY if on else VapiSettings()
    with serve(settings, None if on else gateway_voice.load(example)) as url:
        answer = httpx2.post(url, content=BODY, headers={"x-vapi-secret": SECRET})
    assert answer.status_code == 404
    assert "GATEWAY_VAPI_FILE" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("environ", "faults"),
    [
        ({}, []),
        ({"GATEWAY_VAPI_FILE": "v", "GATEWAY_VAPI_TOKEN": "x"}, []),
        ({"GATEWAY_VAPI_FILE": "v"}, ["nothing by which Vapi is known"]),
        ({"GATEWAY_VAPI_HMAC_KEY": "x"}, ["GATEWAY_VAPI_FILE is not set"]),
        (
            {
                "GATEWAY_VAPI_FILE": "v",
                "GATEWAY_VAPI_TOKEN": "x",
                "GATEWAY_VAPI_SECRET_FILE": "/none",
            },
            ["cannot be read"],
        ),
    ],
)
def test_settings_that_cannot_work_are_told(environ: dict[str, str], faults: list[str]) -> None:
    reader = Reader(environ)
    settings = VapiSettings.read(reader)
    assert len(reader.faults) == len(faults)
    for fault, words in zip(reader.faults, faults, strict=True):
        assert words in fault
    assert "'x'" not in repr(settings)


def test_no_key_signs_nothing() -> None:
    authentication = Authentication(TOKEN_ONLY, now=lambda: NOW_S)
    assert not authentication.by_signature(Headers(signed(stamp, key="")), BODY)


# What is answered.


def test_the_example_answers_everything(example: str) -> None:
    voice = gateway_voice.load(example)
    with serve(SECRET_ONLY, voice) as url:
        line = Line(url)
        assistant = line.tell("assistant-request")["assistant"]
        assert assistant["model"]["provider"] == "custom-llm"
        assert line.use(
            call("opening_hours", day="Monday"),
            call("book_table", date="2026-12-24", guests=4, name="Ada"),
            call("book_table", date="2026-12-24", guests=40, name="Bo"),
            call("book_table", date=SAID, guests=4, name="Cy"),
        ) == [
            {"name": "opening_hours", "toolCallId": "id-opening_hours", "result": "closed"},
            {
                "name": "book_table",
                "toolCallId": "id-book_table",
                "result": '{"booked":true,"date":"2026-12-24","guests":4,"name":"Ada"}',
            },
            {
                "name": "book_table",
                "toolCallId": "id-book_table",
                "result": '{"booked":false,"reason":"no table is free"}',
            },
            {"name": "book_table", "toolCallId": "id-book_table", "error": "it failed"},
        ]
        transfer = line.tell("transfer-destination-request")
        assert transfer == {"destination": {"type": "number", "number": "+15550100"}}
        asked = [{"role": "user", "content": "Anything vegan?"}]
        assert line.tell("knowledge-base-request", messages=asked) == {
            "documents": [{"content": "Vegan dishes: orecchiette, caponata.", "similarity": 0.9}]
        }
        asked[0]["content"] = "And fish?"
        assert line.tell("knowledge-base-request", messages=asked) == {"documents": []}


@pytest.mark.parametrize(
    "type_", ["status-update", "end-of-call-report", "hang", "transcript", "function-call", "new"]
)
def test_what_only_tells_is_acknowledged(example: str, type_: str) -> None:
    with serve(SECRET_ONLY, gateway_voice.load(example)) as url:
        assert Line(url).tell(type_, transcript=SAID) == {}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"name": "show", "parameters": {"a": 1}}, {"a": 1}),
        ({"name": "show", "arguments": {"a": 1}}, {"a": 1}),
        ({"name": "show", "arguments": '{"a": 1}'}, {"a": 1}),
        ({"function": {"name": "show", "arguments": '{"a": 1}'}}, {"a": 1}),
        ({"function": {"name": "show", "arguments": {"a": 1}}}, {"a": 1}),
        ({"function": {"name": "show", "parameters": {"a": 1}}}, {"a": 1}),
        ({"function": {"name": "show", "arguments": ""}}, {}),
        ({"name": "show"}, {}),
        ({"name": "show", "parameters": None, "arguments": {"a": 1}}, {"a": 1}),
    ],
)
def test_arguments_are_found_wherever_they_stand(
    line: Any, members: dict[str, Any], expected: dict[str, Any]
) -> None:
    answers = line("def show(**given): return given\nTOOLS = [show]").use({"id": "1", **members})
    assert [(each["name"], each["toolCallId"]) for each in answers] == [("show", "1")]
    assert json.loads(answers[0]["result"]) == expected


TOOLS = f"""
import asyncio, contextlib, sys, threading
release = threading.Event()
def text(): return "one\\ntwo\\r\\nthree"
def nothing(): pass
def number(): return 3
def listed(): return {{"a": [1, None]}}
def closed(): return print
def raises(said): raise ValueError(said)
def stops(): raise StopIteration("{SAID}")
def leaves(): sys.exit("{SAID}")
def hangs(): release.wait(60)
def two(a, *, b=1): return a + b
async def later(): await asyncio.sleep(0); return "later"
async def raises_later(said): raise ValueError(said)
async def leaves_later(): sys.exit("{SAID}")
async def cancelled(): raise asyncio.CancelledError("{SAID}")
async def stubborn():
    while not release.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)
hidden = text
def secret(): return "{SAID}"
TOOLS = [text, nothing, number, listed, closed, raises, stops, leaves, hangs, two, later,
         raises_later, leaves_later, cancelled, stubborn]
TOOL_LIMIT_S = 1.5
"""


@pytest.mark.parametrize(
    ("wanted", "member", "value"),
    [
        (call("text"), "result", "one two three"),
        (call("nothing"), "result", "done"),
        (call("number"), "result", "3"),
        (call("listed"), "result", '{"a":[1,null]}'),
        (call("two", a=1), "result", "2"),
        (call("two", a=1, b=2), "result", "3"),
        (call("later"), "result", "later"),
        (call("closed"), "error", "it failed"),
        (call("raises", said=SAID), "error", "it failed"),
        (call("stops"), "error", "it failed"),
        (call("leaves"), "error", "it failed"),
        (call("raises_later", said=SAID), "error", "it failed"),
        (call("leaves_later"), "error", "it failed"),
        (call("cancelled"), "error", "it failed"),
        (call("hangs"), "error", "it took too long"),
        (call("stubborn"), "error", "it took too long"),
        (call("two"), "error", "the arguments do not fit the tool"),
        (call("two", a=1, c=SAID), "error", "the arguments do not fit the tool"),
        (call("two", a=1, b="x"), "error", "it failed"),
        (call("nosuch"), "error", "there is no tool of that name"),
        (call("secret"), "error", "there is no tool of that name"),
        (call("hidden"), "error", "there is no tool of that name"),
        (call("__import__"), "error", "there is no tool of that name"),
        ({"id": "id-"}, "error", "there is no tool of that name"),
        ({"id": "id-two", "name": "two", "parameters": [SAID]}, "error", "object"),
        ({"id": "id-two", "name": "two", "arguments": "{" + SAID}, "error", "object"),
        ({"id": "id-two", "name": "two", "function": 1}, "error", "do not fit"),
    ],
)
def test_a_tool_s_answer_is_a_result_or_an_error_that_quotes_nothing(
    line: Any,
    caplog: pytest.LogCaptureFixture,
    wanted: dict[str, Any],
    member: str,
    value: str,
) -> None:
    started = line(TOOLS)
    try:
        (result,) = started.use(wanted)
    finally:
        sys.modules[gateway_voice.MODULE].release.set()
    assert result.keys() == {"name", "toolCallId", member}
    assert value in result[member]
    assert result["toolCallId"] == wanted["id"]
    assert SAID not in json.dumps(result) and SAID not in caplog.text
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


def test_a_failure_is_logged_with_its_place(line: Any, caplog: pytest.LogCaptureFixture) -> None:
    # A dependency of vLLM's, imported by earlier tests, raises the root logger's level.
    caplog.set_level(logging.WARNING, "gateway")
    line("def f(x):\n    return 1 / x\nTOOLS = [f]").use(call("f", x=0))
    (record,) = (each for each in caplog.records if each.name == "gateway.voice")
    assert record.getMessage().endswith("voice.py: f failed at line 2: ZeroDivisionError")


def test_results_stand_in_the_order_of_calls_that_run_at_once(line: Any) -> None:
    source = """
import threading
both = threading.Barrier(2)
def slow(name): both.wait(10); return name
TOOLS = [slow]
"""
    results = line(source).use(
        *({"id": str(n), "name": "slow", "arguments": {"name": f"n{n}"}} for n in range(2))
    )
    assert [(each["toolCallId"], each["result"]) for each in results] == [("0", "n0"), ("1", "n1")]


def test_functions_that_hang_do_not_take_every_thread(
    line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_voice, "MAX_RUNNING", 2)
    started = line(TOOLS)
    release = sys.modules[gateway_voice.MODULE].release
    try:
        told = started.use(*(call("hangs") for _ in range(3)))
        assert [each["error"] for each in told] == [
            "it took too long",
            "it took too long",
            "too many calls are running",
        ]
        assert started.use(call("later"))[0]["result"] == "later"
        assert started.use(call("text"))[0]["error"] == "too many calls are running"
    finally:
        release.set()
    until(lambda: "result" in started.use(call("text"))[0], 10, "the threads to end")


SORRY = {"error": "Sorry, this number cannot take your call at the moment."}


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("ASSISTANT = 'abc'", {"assistantId": "abc"}),
        ("ASSISTANT = {'name': 'x'}", {"assistant": {"name": "x"}}),
        ("def assistant(message): return message['call']['id']", {"assistantId": "c"}),
        ("async def assistant(message): return {'name': 'x'}", {"assistant": {"name": "x"}}),
        ("def assistant(message): return {'error': 'closed'}", {"error": "closed"}),
        (
            "def assistant(message): return {'destination': {'number': '+1'}}",
            {"destination": {"number": "+1"}},
        ),
        ("def assistant(message): return {'squadId': 's'}", {"squadId": "s"}),
        ("def assistant(message): return None", SORRY),
        ("def assistant(message): return 7", SORRY),
        ("def assistant(message): return {'a': print}", SORRY),
        ("def assistant(message): return message['absent']", SORRY),
        ("def assistant(message): import time; time.sleep(9)", SORRY),
        ("def transfer(message): return ''", SORRY),
    ],
)
def test_the_assistant_is_the_file_s(
    line: Any, monkeypatch: pytest.MonkeyPatch, source: str, answer: dict[str, Any]
) -> None:
    monkeypatch.setattr(gateway_vapi, "ASSISTANT_LIMIT_S", 1.5)
    assert line(source).tell("assistant-request") == answer


def test_the_assistant_comes_before_vapi_gives_up() -> None:
    assert gateway_vapi.ASSISTANT_LIMIT_S <= 6 < 7.5
    assert gateway_voice.TOOL_LIMIT_S < 20
    assert gateway_vapi.DOCUMENTS_LIMIT_S < 10


NO_TRANSFER = {"error": "The call cannot be transferred at the moment."}


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("'+1555'", {"destination": {"type": "number", "number": "+1555"}}),
        ("'sip:a@b'", {"destination": {"type": "sip", "sipUri": "sip:a@b"}}),
        ("{'type': 'number', 'number': '1'}", {"destination": {"type": "number", "number": "1"}}),
        (
            "{'destination': {'number': '1'}, 'message': {'type': 'request-start'}}",
            {"destination": {"number": "1"}, "message": {"type": "request-start"}},
        ),
        ("{'error': 'nobody is here'}", {"error": "nobody is here"}),
        ("None", NO_TRANSFER),
        ("1 / 0", NO_TRANSFER),
    ],
)
def test_a_transfer_goes_where_the_file_says(line: Any, source: str, answer: Any) -> None:
    told = line(f"def transfer(message): return {source}").tell("transfer-destination-request")
    assert told == answer


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("['a', 'b']", {"documents": [{"content": t, "similarity": 1.0} for t in "ab"]}),
        (
            "({'content': 'a', 'similarity': 0.5},)",
            {"documents": [{"content": "a", "similarity": 0.5}]},
        ),
        ("{'message': {'content': 'a'}}", {"message": {"content": "a"}}),
        ("[message['messages'][0]]", {"documents": [{"content": "Q", "similarity": 1.0}]}),
        ("None", {"documents": []}),
        ("1 / 0", {"documents": []}),
    ],
)
def test_documents_are_the_file_s(line: Any, source: str, answer: Any) -> None:
    started = line(f"def documents(message): return {source}")
    assert started.tell("knowledge-base-request", messages=["Q"]) == answer


def test_what_the_file_does_not_have_is_declined(line: Any) -> None:
    started = line("ASSISTANT = 'abc'")
    assert started.tell("transfer-destination-request") == NO_TRANSFER
    assert started.tell("knowledge-base-request") == {"documents": []}
    assert started.use(call("f"))[0]["error"] == "there is no tool of that name"


# The voice file.


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(:", "is not valid Python: .*, line 1"),
        ("a = 1\nimport nosuchmodule", "ModuleNotFoundError at line 2: .*nosuchmodule"),
        ("import sys; sys.exit('no')", "SystemExit at line 1: no"),
        ("", "none of ASSISTANT"),
        ("TOOLS = []", "none of ASSISTANT"),
        ("ASSISTANT = 1", "neither an assistant's id nor"),
        ("ASSISTANT = ''", "neither an assistant's id nor"),
        ("ASSISTANT = {'f': print}", "cannot be written as JSON"),
        ("ASSISTANT = 'a'\ndef assistant(m): pass", "both ASSISTANT and assistant"),
        ("assistant = {'a': 1}", "assistant is not a function"),
        ("def transfer(): pass", "transfer does not take one argument"),
        ("def documents(a, b): pass", "documents does not take one argument"),
        ("TOOLS = 'f'", "TOOLS is not a list"),
        ("TOOLS = ['f']", r"TOOLS\[0\] is not a function with a name"),
        ("TOOLS = [lambda: 1]", r"TOOLS\[0\] is not a function with a name"),
        ("def f(): pass\nTOOLS = [f, f]", "names f twice"),
        ("def f(a, /): pass\nTOOLS = [f]", "parameters without a name"),
        ("def f(): pass\nTOOLS = [f]\nTOOL_LIMIT_S = 0", "TOOL_LIMIT_S is not a positive"),
        ("def f(): pass\nTOOLS = [f]\nTOOL_LIMIT_S = 'a'", "TOOL_LIMIT_S is not a positive"),
        ("def f(): pass\nTOOLS = [f]\nTOOL_LIMIT_S = True", "TOOL_LIMIT_S is not a positive"),
    ],
)
def test_a_file_that_cannot_work_is_told_at_the_start(
    tmp_path: Path, source: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as told:
        gateway_voice.load(write(tmp_path, source))
    assert "voice.py" in str(told.value)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        gateway_voice.load(write(tmp_path, "ASSISTANT = 1\ntransfer = 2\nTOOLS = 3"))
    assert len(told.value.faults) == 3


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646, 0o622])
def test_a_file_that_others_can_write_is_not_run(tmp_path: Path, mode: int) -> None:
    path = Path(write(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')"))
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod go-w"):
        gateway_voice.load(str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["absent.py", "."])
def test_what_is_no_file_is_told(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read|not a regular file"):
        gateway_voice.load(str(tmp_path / path))


def test_a_file_may_define_dataclasses(tmp_path: Path) -> None:
    source = """
from __future__ import annotations
import dataclasses
@dataclasses.dataclass
class Table:
    seats: int
def f(): return dataclasses.asdict(Table(2))
TOOLS = [f]
"""
    assert list(gateway_voice.load(write(tmp_path, source)).tools) == ["f"]


# The whole gateway.


def test_the_gateway_serves_the_webhook_beside_its_key(example: str, tmp_path: Path) -> None:
    settings = {
        "GATEWAY_KEY": "for-the-openai-routes",
        "GATEWAY_VAPI_FILE": example,
        "GATEWAY_VAPI_SECRET": SECRET,
        "GATEWAY_VAPI_HMAC_KEY": KEY,
        "GATEWAY_ALLOWED_HOSTS": "gateway.example.com",
    }
    body = {"message": {"type": "tool-calls", "toolCallList": [call("book_table", date=SAID)]}}
    content = json.dumps(body).encode()
    with (
        Echo(tmp_path) as echo,
        RunningGateway(echo.environ, tmp_path / "gateway", **settings) as gateway,
    ):

        def post(headers: dict[str, str], content: bytes = content) -> httpx2.Response:
            host = {"host": "gateway.example.com"}
            return gateway.http.post("/vapi/webhook", content=content, headers={**host, **headers})

        assert post({"x-vapi-secret": SECRET}).json()["results"][0]["error"]
        assert post({"authorization": "Bearer for-the-openai-routes"}).status_code == 401
        fresh = signed(str(int(time.time())), content)
        assert post(fresh).status_code == 200
        assert post(fresh).status_code == 401
        assert post(signed(str(int(time.time()) - 3600), content)).status_code == 401
        assert (
            gateway.http.get("/vapi/webhook", headers={"x-vapi-secret": SECRET}).status_code == 404
        )
        assert post({"x-vapi-secret": SECRET}, b"x" * 8_000_000).status_code == 413

        # Vapi's model: the OpenAI route, with what Vapi adds to the body, under each of its paths.
        asked = {
            "model": "echo",
            "messages": [{"role": "user", "content": SAID}],
            "stream": True,
            "call": {"id": "c"},
            "phoneNumber": {"id": "p"},
            "customer": {"number": "+15550100"},
            "metadata": {"a": 1},
        }
        for path in ("/chat/completions", "/v1/chat/completions", "/v1/chat/completions/"):
            headers = {"authorization": "Bearer for-the-openai-routes"}
            answer = gateway.http.post(path, json=asked, headers=headers)
            assert answer.status_code == 200, path
            lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
            words = [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines]
            assert "".join(words).strip() == SAID
        assert SAID.encode() not in echo.carried
        assert SAID not in gateway.log


def test_a_gateway_with_a_bad_voice_file_does_not_start(tmp_path: Path) -> None:
    settings = {
        "GATEWAY_VAPI_FILE": write(tmp_path, "def f(:"),
        "GATEWAY_VAPI_SECRET": SECRET,
        "RUNPOD_ENDPOINT_ID": "e",
        "RUNPOD_API_KEY": "k",
        "RUNPOD_API_BASE": "http://127.0.0.1:9",
        "ENCRYPTION_KEY": "A" * 43 + "=",
    }
    gateway = RunningGateway({}, tmp_path / "gateway", **settings)
    try:
        assert gateway.process.wait(30) == ConfigError.exit_code
        assert "voice.py is not valid Python" in gateway.log
    finally:
        gateway.__exit__()
