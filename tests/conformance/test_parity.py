"""Through the gateway comes what vLLM's own server would have sent, member by member."""

import json
from collections.abc import Iterator
from functools import reduce
from itertools import groupby
from typing import Any

import httpx2
import pytest

from tests.conformance.conftest import TALKER
from tests.conformance.reference import (
    CHAT,
    PARITY,
    STREAMED,
    TEXTS,
    asked,
    asked_streamed,
    constant,
    texts,
    user,
    vllms_server,
)
from tests.conformance.stage import LOCAL_KEY, SERVED, Stage, canary

pytestmark = pytest.mark.engine

HEADERS = {"Authorization": f"Bearer {LOCAL_KEY}", "Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(chat: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """vLLM's own server with the settings of the worker."""
    with vllms_server(
        TALKER,
        SERVED,
        tmp_path_factory.mktemp("server"),
        "--dtype=float32",
        "--max-model-len=2048",
        "--kv-cache-memory-bytes=268435456",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
        "--tool-strict-level=parameter",
        '--structured-outputs-config={"backend":"xgrammar","disable_any_whitespace":true}',
        "--max-num-seqs=64",
    ) as client:
        yield client


def both(
    chat: Stage, server: httpx2.Client, path: str, body: Any
) -> tuple[httpx2.Response, httpx2.Response]:
    """Return what the gateway answers and what vLLM's own server does."""
    if body is None:
        return chat.gateway.http.get(path, headers=HEADERS), server.get(path)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    ours = chat.gateway.http.post(path, content=content, headers=HEADERS)
    theirs = server.post(path, content=content, headers=HEADERS)
    assert ours.status_code == theirs.status_code, ours.text
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    return ours, theirs


@pytest.mark.parametrize("name", PARITY)
def test_a_body_is_that_of_vllms_own_server(chat: Stage, server: httpx2.Client, name: str) -> None:
    ours, theirs = both(chat, server, *asked(name, SERVED))
    assert as_vllm_has_it(name, ours.json()) == constant(theirs.json())


def as_vllm_has_it(name: str, body: Any) -> Any:
    """Return the body in vLLM's words, without what only this worker tells (SPEC section 8.3)."""
    if name == "models":
        for card in body["data"]:
            assert card.pop("tasks")
    if name == "unknown model":
        # vLLM leaves adapters out of its list; here there are none.
        said = body["error"]["message"].replace("; this worker has ", ". Valid aliases: ")
        body["error"]["message"] = said + "."
    return constant(body)


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_what_is_no_object_is_refused_in_the_same_form_but_at_home(
    chat: Stage, server: httpx2.Client, content: bytes
) -> None:
    ours, theirs = both(chat, server, CHAT, content)
    assert "x-job-id" not in ours.headers
    refusals = [each.json()["error"] for each in (ours, theirs)]
    assert "the body is not" in refusals[0]["message"]
    assert refusals[0].keys() == refusals[1].keys()
    assert refusals[0]["code"] == refusals[1]["code"]


def events(stream: str) -> list[tuple[str, Any]]:
    """Return names and data of a stream's events; the gateway's comments are none."""
    found = []
    for part in stream.split("\n\n"):
        lines = [line for line in part.split("\n") if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            data = fields.pop("data")
            assert fields.keys() <= {"event"}
            found.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


def shape(value: Any) -> Any:
    """Return the value with nothing in the place of texts."""
    if isinstance(value, list):
        return [shape(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: "" if name in TEXTS and isinstance(item, str) else shape(item)
        for name, item in value.items()
    }


def joined(whole: Any, part: Any) -> Any:
    """Return what two deltas amount to, as a client puts them together."""
    if isinstance(whole, dict) and isinstance(part, dict):
        both = {**whole, **part}
        for name in whole.keys() & part.keys():
            pieces = whole[name], part[name]
            a_text = name in TEXTS and all(isinstance(piece, str) for piece in pieces)
            both[name] = "".join(pieces) if a_text else joined(*pieces)
        return both
    if isinstance(whole, list) and isinstance(part, list):
        if not all(isinstance(item, dict) and "index" in item for item in whole + part):
            return whole + part
        items: dict[int, Any] = {}
        for item in whole + part:
            items[item["index"]] = joined(items.get(item["index"]), item)
        return [items[index] for index in sorted(items)]
    return whole if part is None else part


def told(stream: str) -> Any:
    """Return all that a stream tells, but where a text was cut and how choices took turns.

    Both depend on timing: an engine that is ahead of its reader puts tokens together.
    """
    found = [(event, constant(data)) for event, data in events(stream)]
    chunks = [data for _, data in found if isinstance(data, dict) and data.get("choices")]
    if chunks:
        rest = [each for each in found if each[1] not in chunks]
        return reduce(joined, chunks), {tuple(chunk) for chunk in chunks}, rest
    shapes = ((event, shape(data)) for event, data in found)
    return [each for each, _ in groupby(shapes)], "".join(texts([data for _, data in found]))


@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_is_that_of_vllms_own_server(
    chat: Stage, server: httpx2.Client, name: str
) -> None:
    ours, theirs = both(chat, server, *asked_streamed(name, SERVED))
    if theirs.status_code == 200:
        assert told(ours.text) == told(theirs.text)
        assert "".join(texts([data for _, data in events(theirs.text)]))
    else:
        assert as_vllm_has_it(name, ours.json()) == constant(theirs.json())


VAPI = {
    "call": {"id": "7420f27a", "type": "inboundPhoneCall", "orgId": "eb166faa"},
    "phoneNumber": {"id": "d19fd1c1", "number": "+15550100"},
    "customer": {"number": "+15550101"},
    "assistant": {"name": "Mary", "model": {"provider": "custom-llm"}},
    "assistantId": None,
    "metadata": {"numAssistantTurns": "2"},
    "timestamp": 1751274123456,
}
"""What Vapi sends along with a chat."""


@pytest.mark.parametrize("stream", [True, False])
def test_what_vapi_sends_along_changes_nothing(
    chat: Stage, server: httpx2.Client, stream: bool
) -> None:
    content = f"My name is {canary('vapi', 'chat')} Tell me about the sea."
    body = {
        "model": SERVED,
        "messages": user(content),
        "temperature": 0,
        "max_tokens": 20,
        "stream": stream,
    }
    with_more = chat.gateway.http.post(CHAT, json={**body, **VAPI}, headers=HEADERS)
    assert with_more.status_code == 200, with_more.text
    plain = server.post(CHAT, json=body)
    if stream:
        assert told(with_more.text) == told(plain.text)
        assert "".join(texts([data for _, data in events(plain.text)])).count(" ") > 10
    else:
        assert constant(with_more.json()) == constant(plain.json())
        assert plain.json()["choices"][0]["message"]["content"]
    assert any(sent.body.items() >= VAPI.items() for sent in chat.sent("vapi", "chat"))
