"""What one request may ask for: counted on every route that has the member, refused in numbers."""

import json
from typing import Any

import pytest

from errors import RequestError
from protocol import GENERATE, ROUTES, Call
from request_bounds import Bounds, default_max_choices

BOUNDS = Bounds(max_request_bytes=10_000, max_choices=8, max_inputs=20)
CHAT = "/v1/chat/completions"
SCORING = ("/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank")


def call(route: str, body: Any) -> Call:
    return Call(route, "POST", body if isinstance(body, bytes) else json.dumps(body).encode())


def refusal(route: str, body: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        BOUNDS.check(call(route, body))
    return caught.value


@pytest.mark.parametrize("route", [GENERATE, *ROUTES])
def test_a_body_may_have_so_many_bytes(route: str) -> None:
    BOUNDS.check(call(route, b"x" * 10_000))
    error = refusal(route, b"x" * 10_001)
    assert (error.status, error.code) == (413, "request_too_large")
    assert "10001" in error.message
    assert "10000 (MAX_REQUEST_BYTES)" in error.message


@pytest.mark.parametrize("name", ["n", "best_of"])
@pytest.mark.parametrize("value", [9, 1000, "1000", " 1_000 ", 1000.0, "1000.0", "+1_000.00"])
def test_choices_are_counted_however_vllm_would_read_them(name: str, value: Any) -> None:
    for route in (CHAT, "/v1/completions"):
        error = refusal(route, {name: value})
        assert (error.status, error.param) == (400, name)
        assert f"is {int(float(value))}" in error.message
        assert "8 choices in one request (MAX_CHOICES)" in error.message
    assert refusal(GENERATE, {"prompt": "x", "sampling_params": {name: value}}).param == name


@pytest.mark.parametrize("value", [1, 8, "8", None, -5, "many", "9" * 5000, [], {}, True])
def test_other_numbers_are_left_to_vllm(value: Any) -> None:
    BOUNDS.check(call(CHAT, {"n": value}))
    BOUNDS.check(call("/v1/completions", {"n": value, "prompt": "x"}))
    BOUNDS.check(call(GENERATE, {"prompt": "x", "sampling_params": {"n": value}}))


def test_the_last_of_two_members_of_one_name_counts() -> None:
    BOUNDS.check(call(CHAT, b'{"n": 1000, "n": 1}'))
    assert "is 1000" in refusal(CHAT, b'{"n": 1, "n": 1000}').message


@pytest.mark.parametrize("prompts", [["a"] * 5, [[1, 2]] * 5])
def test_each_prompt_has_its_choices(prompts: Any) -> None:
    BOUNDS.check(call("/v1/completions", {"prompt": prompts}))
    error = refusal("/v1/completions", {"prompt": prompts, "n": 2})
    assert "5 prompts of 2, which are 10 choices" in error.message
    assert error.param == "prompt"


def test_tokens_are_one_prompt() -> None:
    BOUNDS.check(call("/v1/completions", {"prompt": [1] * 1000, "n": 8}))
    BOUNDS.check(call(GENERATE, {"prompt": [1] * 1000}))


@pytest.mark.parametrize("route", ["/v1/embeddings", "/pooling", "/classify"])
def test_texts_are_counted(route: str) -> None:
    for texts in (["a"] * 21, [[1]] * 21, [[{"role": "user", "content": "a"}]] * 21):
        name = "messages" if isinstance(texts[0][0], dict) else "input"
        BOUNDS.check(call(route, {name: texts[:20]}))
        error = refusal(route, {name: texts})
        assert f"`{name}` has 21 texts" in error.message
        assert "20 (MAX_INPUTS)" in error.message
    for one in ("a" * 1000, [1] * 1000):
        BOUNDS.check(call(route, {"input": one}))
    BOUNDS.check(call(route, {"messages": [{"role": "user", "content": "a"}] * 100}))


@pytest.mark.parametrize("route", SCORING)
@pytest.mark.parametrize("name", ["documents", "items", "queries", "text_2", "data_1"])
def test_pairs_are_counted(route: str, name: str) -> None:
    part = {"type": "text", "text": "a"}
    for texts in (["a"] * 21, [{"content": [part]}] * 21, {"content": [part] * 21}):
        assert refusal(route, {"query": "x", name: texts}).param == name
    BOUNDS.check(call(route, {"query": "x", name: ["a"] * 20}))


def test_a_conversation_has_as_many_messages_as_it_likes() -> None:
    messages = [{"role": "user", "content": "a"}] * 100
    for body in ({"messages": messages}, {"input": messages}):
        for route in (CHAT, "/v1/responses", "/v1/messages"):
            BOUNDS.check(call(route, body))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b'{"n": 1e999}', b'{"n": "\\ud800"}', b"{}", b"[" * 5000]
)
def test_what_is_no_request_is_left_to_vllm(body: bytes) -> None:
    for route in (GENERATE, *ROUTES):
        BOUNDS.check(Call(route, "POST", body))


@pytest.mark.parametrize(("seats", "choices"), [(1, 1), (2, 1), (8, 4), (256, 128), (1024, 128)])
def test_one_request_has_half_of_the_engines_seats_at_most(seats: int, choices: int) -> None:
    assert default_max_choices(seats) == choices
