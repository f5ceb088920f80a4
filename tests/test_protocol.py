"""The request's bytes, strict JSON, `generate` bodies and the forms of a job's input."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto import new_request
from errors import Rejected, RequestError
from protocol import (
    GENERATE,
    MAX_DEPTH,
    Call,
    PlaintextInput,
    SealedInput,
    SimpleInput,
    json_bytes,
    pad_request,
    padded_size,
    parse_generate,
    parse_job_input,
    parse_request,
    strict_json,
    unpad_request,
)

CANARY = "canary-of-the-prompt"


# Padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "padded"),
    [(0, 1024), (1, 1024), (1024, 1024), (1025, 2048), (524_288, 524_288), (524_289, 1_048_576),
     (1_048_576, 1_048_576), (1_048_577, 2_097_152), (5_000_000, 5_242_880)],
)  # fmt: skip
def test_padded_sizes(size: int, padded: int) -> None:
    assert padded_size(size) == padded


@given(st.integers(0, 2**24))
@settings(deadline=None)
def test_padded_sizes_are_few_and_large_enough(size: int) -> None:
    padded = padded_size(size)
    assert padded >= size
    assert padded == 1024 or padded < 2 * size
    assert padded % 2**20 == 0 or padded & (padded - 1) == 0


@given(st.binary(max_size=3000))
@settings(deadline=None)
def test_padding_comes_off_again(content: bytes) -> None:
    inside = pad_request(content)
    assert unpad_request(inside) == content
    wrong = [inside + bytes(1024), inside[:-1]]
    if len(inside) > 4 + len(content):
        wrong.append(inside[:-1] + b"\1")
    for other in wrong:
        with pytest.raises(ValueError):
            unpad_request(other)


# JSON -------------------------------------------------------------------------------------

NOT_JSON = [
    b"", b" ", b"{", b"nul", b"{}x", b"{} {}", b"{'a':1}", b'{"a":NaN}', b"Infinity", b"-Infinity",
    b"1e999", b"1" * 5000, b'"\\ud800"', b'"\\udc00 x"', b'"\xed\xa0\x80"', b"\xff",
    b"\xef\xbb\xbf{}", b'"\n"', b"01", b"[1,]", b"\0", b"[" * 10_000, b"[" * 10_000 + b"]" * 10_000,
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b"[" * 101 + b"]" * 101,
]  # fmt: skip


@pytest.mark.parametrize("data", NOT_JSON, ids=lambda data: ascii(data)[:16])
def test_what_is_not_json_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        strict_json(data)


def test_text_with_a_lone_surrogate_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="UTF-8"):
        strict_json('"\ud800"')


def test_depth_is_counted_not_brackets() -> None:
    assert MAX_DEPTH == 100
    deep: Any = strict_json(b"[" * 100 + b"]" * 100)
    while deep:
        [deep] = deep
    assert len(strict_json(b"[" + b"[]," * 1000 + b"[]]")) == 1001
    assert strict_json(b'"' + b"[" * 1000 + b'"') == "[" * 1000


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
)


@given(json_values)
@settings(deadline=None)
def test_json_goes_round(value: Any) -> None:
    assert strict_json(json_bytes(value)) == value
    assert strict_json(json.dumps(value)) == value


@given(st.binary(max_size=60))
@settings(deadline=None)
def test_any_bytes_are_json_or_a_value_error(data: bytes) -> None:
    try:
        strict_json(data)
    except ValueError as error:
        assert type(error) is ValueError


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, {"a": -math.inf}, "\ud800", {"\ud800": 1}, b"x", {1, 2}, object()]
)
def test_values_that_json_does_not_have_are_value_errors(value: Any) -> None:
    with pytest.raises(ValueError):
        json_bytes(value)


def test_values_nested_too_deep_are_value_errors() -> None:
    value: Any = []
    for _ in range(100):
        value = [value]
    with pytest.raises(ValueError, match="nested"):
        json_bytes(value)
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match="nested"):
        json_bytes(value)
    while value:
        [value] = value


# Requests ---------------------------------------------------------------------------------


def test_a_request_tells_what_to_call() -> None:
    request = new_request("/v1/x", b' {"a": 1} ', audience="a", ttl_s=1)
    assert parse_request(request.encode()).call == Call("/v1/x", "POST", b'{"a": 1}')
    get = new_request("worker", None, audience="a", ttl_s=1, method="GET")
    assert parse_request(get.encode()).call == Call("worker", "GET", b"")


# Generate bodies --------------------------------------------------------------------------


def test_generate_bodies() -> None:
    chat = parse_generate(b'{"messages":[{"role":"user","content":"Hi"}],"stream":false}')
    assert chat.messages == [{"role": "user", "content": "Hi"}]
    assert (chat.stream, chat.sampling_params) == (False, {})
    assert parse_generate(b'{"prompt":[1,2]}').prompt == [1, 2]
    assert parse_generate(b'{"prompt":"Hi"}').stream is True


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"[]", None),
        (b"nonsense", None),
        (b'{"prompt":NaN}', None),
        (b"{}", "messages"),
        (b'{"messages":[]}', "messages"),
        (b'{"prompt":""}', "prompt"),
        (b'{"prompt":[]}', "prompt"),
        (b'{"prompt":"a","messages":[{"role":"user"}]}', "messages"),
        (b'{"prompt":1}', "prompt"),
        (b'{"prompt":[1.5]}', "prompt"),
        (b'{"prompt":[true]}', "prompt"),
        (b'{"messages":"a"}', "messages"),
        (b'{"messages":["a"]}', "messages"),
        (b'{"prompt":"a","stream":"yes"}', "stream"),
        (b'{"prompt":"a","sampling_params":[]}', "sampling_params"),
        (b'{"prompt":"a","max_tokens":1}', "max_tokens"),
    ],
)
def test_generate_bodies_that_are_wrong_name_the_member(body: bytes, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse_generate(body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message.startswith("generate: ")


# Job inputs -------------------------------------------------------------------------------


def test_encrypted_forms() -> None:
    assert parse_job_input({"sealed": "1.x.y"}) == SealedInput("1.x.y")
    assert parse_job_input({"encrypted_input": "gAAA"}) == SimpleInput("gAAA")


@pytest.mark.parametrize("member", ["sealed", "encrypted_input"])
def test_encrypted_forms_stand_alone(member: str) -> None:
    for wrong in (
        {member: "x", "prompt": CANARY},
        {member: "x", "stream": True},
        {"sealed": "x", "encrypted_input": "x"},
        {member: None},
        {member: 1},
        {member: {"a": CANARY}},
        {member: [CANARY]},
    ):
        with pytest.raises(Rejected):
            parse_job_input(wrong)


def test_the_openai_route_carries_the_sealed_form() -> None:
    given = {"sealed": "1.x.y", "stream": True}
    for job_input in (
        {"openai_route": "/v1/chat/completions", "openai_input": given},
        {"openai_route": "/v1/models", "openai_input": given},
        {"openai_input": given},
    ):
        assert parse_job_input(job_input) == SealedInput("1.x.y", as_events=True)


@pytest.mark.parametrize(
    "job_input",
    [
        {"openai_input": {"sealed": "x"}},
        {"openai_input": {"sealed": "x", "stream": False}},
        {"openai_input": {"sealed": "x", "stream": 1}},
        {"openai_input": {"sealed": "x", "stream": "true"}},
        {"openai_input": {"sealed": "x", "stream": True, "model": CANARY}},
        {"openai_input": {"sealed": "x", "stream": True, "messages": [CANARY]}},
        {"openai_input": {"sealed": None, "stream": True}},
        {"openai_input": {"sealed": [CANARY], "stream": True}},
        {"openai_input": {"sealed": "x", "stream": True}, "prompt": CANARY},
    ],
)
def test_it_carries_nothing_beside(job_input: Any) -> None:
    with pytest.raises(Rejected):
        parse_job_input(job_input)


MESSAGES = [{"role": "user", "content": CANARY}]


@pytest.mark.parametrize(
    ("job_input", "call", "stream", "form"),
    [
        ({"openai_route": "/v1/models"}, Call("/v1/models", "GET", b""), False, "openai"),
        (
            {"openai_route": "/v1/models", "openai_input": {}},
            Call("/v1/models", "GET", b""),
            False,
            "openai",
        ),
        (
            {"openai_route": "/v1/responses", "openai_input": {"input": "é", "stream": True}},
            Call("/v1/responses", "POST", '{"input":"é","stream":true}'.encode()),
            True,
            "openai",
        ),
        (
            {"openai_input": {"messages": []}},
            Call("/v1/chat/completions", "POST", b'{"messages":[]}'),
            False,
            "openai",
        ),
        (
            {"openai_input": {"prompt": "a"}},
            Call("/v1/completions", "POST", b'{"prompt":"a"}'),
            False,
            "openai",
        ),
        ({"route": "/v1/models"}, Call("/v1/models", "GET", b""), False, "route"),
        (
            {"route": "/v1/x", "body": {"a": 1}},
            Call("/v1/x", "POST", b'{"a":1}'),
            False,
            "route",
        ),
        ({"route": "/v1/x", "method": "post"}, Call("/v1/x", "POST", b"{}"), False, "route"),
        (
            {"prompt": "a"},
            Call(GENERATE, "POST", b'{"prompt":"a","stream":false}'),
            False,
            "generate",
        ),
        (
            {"messages": [{"role": "user"}], "stream": True, "sampling_params": {"n": 2}},
            Call(
                GENERATE,
                "POST",
                b'{"messages":[{"role":"user"}],"stream":true,"sampling_params":{"n":2}}',
            ),
            True,
            "generate",
        ),
        (
            {"prompt": "a", "max_tokens": 5, "sampling_params": {"n": 2}},
            Call(
                GENERATE,
                "POST",
                b'{"prompt":"a","sampling_params":{"n":2,"max_tokens":5},"stream":false}',
            ),
            False,
            "generate",
        ),
        (
            {"prompt": "a", "apply_chat_template": True},
            Call(
                GENERATE,
                "POST",
                b'{"messages":[{"role":"user","content":"a"}],"stream":false}',
            ),
            False,
            "generate",
        ),
    ],
)
def test_plaintext_forms(job_input: Any, call: Call, stream: bool, form: Any) -> None:
    before = json.dumps(job_input)
    parsed = parse_job_input(job_input)
    assert isinstance(parsed, PlaintextInput)
    same = parsed.call.route, parsed.call.method, parsed.stream, parsed.form
    assert same == (call.route, call.method, stream, form)
    assert parsed.call.body == call.body
    assert json.dumps(job_input) == before
    if call.route == GENERATE:
        parse_generate(parsed.call.body)


@pytest.mark.parametrize(
    "job_input",
    [
        None,
        CANARY,
        [CANARY],
        7,
        {},
        {CANARY: 1},
        {"stream": True},
        {"openai_route": "/v1/models", CANARY: 1},
        {"openai_input": {"input": CANARY}},
        {"openai_input": CANARY},
        {"openai_route": {}, "openai_input": {"prompt": CANARY}},
        {"openai_route": "", "openai_input": {"prompt": CANARY}},
        {"openai_route": "/v1/x", "openai_input": {"messages": MESSAGES}, "route": "/v1/x"},
        {"route": "/v1/x", "body": {}, "messages": MESSAGES},
        {"route": "/v1/x", "body": [CANARY]},
        {"route": "/v1/x", "method": "PUT"},
        {"route": "/v1/x", "method": 1},
        {"route": "/v1/x", "method": "GET", "body": {"prompt": CANARY}},
        {"route": None},
        {"route": "/v1/x", "body": {"a": math.nan}},
        {"route": "/v1/x", "body": {"a": "\ud800"}},
        {"prompt": "\ud800" + CANARY},
        {"prompt": CANARY, "sampling_params": [1]},
        {"prompt": CANARY, "sampling_params": {"n": 1}, "n": 2},
        {"prompt": CANARY, "temperature": math.inf},
        {"prompt": CANARY, "stream": "yes"},
        {"prompt": CANARY, "apply_chat_template": 1},
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_other_input_is_told_what_is_wrong_and_not_quoted(job_input: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse_job_input(job_input)
    assert caught.value.status == 400
    assert CANARY not in repr(caught.value.body())


def test_input_nested_too_deep_is_a_request_error() -> None:
    deep: Any = CANARY
    for _ in range(10_000):
        deep = [deep]
    for job_input in ({"route": "/v1/x", "body": {"a": deep}}, {"prompt": "a", "b": deep}):
        with pytest.raises(RequestError, match="nested"):
            parse_job_input(job_input)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *("sealed", "encrypted_input", "openai_route", "openai_input", "route", "body"),
                *("method", "prompt", "messages", "stream", "sampling_params", "max_tokens"),
                *("apply_chat_template", "other"),
            ]
        ),
        json_values,
        max_size=4,
    )
)
@settings(max_examples=300, deadline=None)
def test_any_input_has_a_form_or_one_of_two_errors(job_input: dict[str, Any]) -> None:
    try:
        parsed = parse_job_input(job_input)
    except (Rejected, RequestError):
        return
    assert isinstance(parsed, SealedInput | SimpleInput | PlaintextInput)
