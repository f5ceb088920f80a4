"""What the clients made of the answers is what the worker says to the native client."""

import json
from itertools import groupby
from typing import Any

import pytest

from tests.conformance.stage import ANSWERED, SERVED, Stage

pytestmark = pytest.mark.engine

MANY = ["openai_python", "openai_node", "langchain_", "anthropic_"]


def plain(tools: list[Any]) -> list[Any]:
    """Return tool calls with their arguments as an object, however a client hands them out."""
    return [[name, json.loads(a) if isinstance(a, str) else a] for name, a in tools]


def with_plain_tools(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a choice whose tools' arguments are objects.

    Streamed they come as the model wrote them, whole as vLLM writes them anew.
    """
    return {**choice, "tools": plain(choice.get("tools", []))}


@pytest.mark.parametrize(
    ("client", "name"), [(client, name) for client, names in ANSWERED.items() for name in names]
)
def test_an_answer_is_the_workers_own(chat: Stage, client: str, name: str) -> None:
    told = chat.told(client, name)
    (sent,) = chat.sent(client, name)
    said = chat.says(sent)
    assert told.get("asked", {}).items() <= sent.body.items(), "the gateway changed the request"
    compared = told.keys() & {"choices", "text", "tools", "parsed"}
    assert compared
    if "choices" in told:
        assert [with_plain_tools(c) for c in told["choices"]] == [
            with_plain_tools(c) for c in said["choices"]
        ]
        assert all(choice["text"] or choice.get("tools") for choice in told["choices"])
    if "text" in told:
        assert told["text"] == said["text"]
    if "tools" in told:
        assert told["tools"] == plain(said["tools"])
    if "parsed" in told:
        tools = plain(said.get("tools", []))
        assert told["parsed"] == (tools[0][1] if tools else json.loads(said["text"]))
        assert told["parsed"].keys() == {"city", "warm"}
    for member in told.keys() & {"finish", "status", "output_tokens"} & said.keys():
        assert told[member] == said[member]


@pytest.mark.parametrize("client", [client for client in ANSWERED if client != "llm_cli"])
def test_streamed_answers_come_in_pieces(chat: Stage, client: str) -> None:
    # Of one alone a busy machine may make a single piece: tokens that wait are put together.
    told = [chat.told(client, name) for name in ANSWERED[client]]
    assert max(facts.get("chunks", 0) for facts in told) > 2


@pytest.mark.parametrize("client", ["openai_python", "openai_node"])
@pytest.mark.parametrize("name", ["chat", "usage_chunk"])
def test_usage_is_what_the_worker_counted(chat: Stage, client: str, name: str) -> None:
    told = chat.told(client, name)
    (sent,) = chat.sent(client, name)
    usage = told["usage"]
    counted = {"in": usage["prompt_tokens"], "out": usage["completion_tokens"]}
    assert counted == chat.says(sent)["usage"]
    # OpenAI sends it in a chunk without choices, after the others.
    assert told.get("choices_beside_usage", 0) == 0


@pytest.mark.parametrize("client", ["openai_python", "openai_node"])
def test_no_usage_chunk_unless_it_is_asked_for(chat: Stage, client: str) -> None:
    assert "usage" not in chat.told(client, "chat_streamed")


@pytest.mark.parametrize(
    ("client", "name"),
    [
        ("openai_python", "logprobs"),
        ("openai_python", "logprobs_streamed"),
        ("openai_node", "logprobs"),
    ],
)
def test_logprobs_spell_the_answer(chat: Stage, client: str, name: str) -> None:
    told = chat.told(client, name)
    assert "".join(told["tokens"]) == told["choices"][0]["text"]
    assert set(told["tops"]) == {2}


@pytest.mark.parametrize("client", ["openai_python", "openai_node"])
def test_an_answer_ends_before_its_stop_word(chat: Stage, client: str) -> None:
    (choice,) = chat.told(client, "stop")["choices"]
    assert (choice["text"], choice["finish"]) == ("one two", "stop")


@pytest.mark.parametrize("client", ["openai_python", "openai_node"])
def test_several_choices_are_told_apart(chat: Stage, client: str) -> None:
    first, second = chat.told(client, "choices")["choices"]
    assert first["text"] != second["text"]


@pytest.mark.parametrize(
    ("client", "name"),
    [
        ("openai_python", "tool"),
        ("openai_python", "tool_streamed"),
        ("openai_node", "tool"),
        ("openai_node", "tool_streamed"),
    ],
)
def test_a_forced_tool_is_called(chat: Stage, client: str, name: str) -> None:
    (choice,) = chat.told(client, name)["choices"]
    ((called, arguments),) = plain(choice["tools"])
    assert called == "weather"
    assert arguments["city"] in ("Paris", "Rome")


def test_a_response_tells_its_events_in_order(chat: Stage) -> None:
    # How many deltas there are depends on timing.
    kinds, others = (
        [kind for kind, _ in groupby(chat.told(client, "responses_streamed")["kinds"])]
        for client in ("openai_python", "openai_node")
    )
    assert kinds == others
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")


def test_a_request_has_an_id(chat: Stage) -> None:
    assert chat.told("openai_python", "chat")["request_id"]


@pytest.mark.parametrize(
    ("client", "name"),
    [("openai_python", "models"), ("openai_node", "models"), ("open_webui", "models")],
)
def test_the_models_are_listed(chat: Stage, client: str, name: str) -> None:
    assert chat.told(client, name)["models"] == [SERVED]


def test_llm_lists_the_models_of_an_endpoint(chat: Stage) -> None:
    assert SERVED in chat.told("llm_cli", "endpoint_models")["text"].split()


def test_llm_tells_the_usage(chat: Stage) -> None:
    told = chat.told("llm_cli", "usage")
    (sent,) = chat.sent("llm_cli", "usage")
    usage = chat.says(sent)["usage"]
    assert f"Token usage: {usage['in']} input, {usage['out']} output" in told["note"]


@pytest.mark.parametrize("name", ["continued", "chat"])
def test_llm_sends_the_first_turn_along_with_the_second(chat: Stage, name: str) -> None:
    told = chat.told("llm_cli", name)
    first, second = chat.sent("llm_cli", name)
    answers = [chat.says(sent)["text"] for sent in (first, second)]
    assert all(answer in told.get("first", "") + told["text"] for answer in answers)
    assert second.body["messages"][1] == {"role": "assistant", "content": answers[0]}


def test_anthropic_counts_tokens(chat: Stage) -> None:
    told = chat.told("anthropic_", "count_tokens")
    (sent,) = chat.sent("anthropic_", "count_tokens")
    assert told["tokens"] == chat.answer(sent).json()["input_tokens"]


def test_open_webui_gets_a_stream_of_events_with_usage_and_an_end(chat: Stage) -> None:
    told = chat.told("open_webui", "chat")
    assert (told["status"], told["kind"], told["done"]) == (200, "text/event-stream", True)
    (sent,) = chat.sent("open_webui", "chat")
    assert told["usage"]["completion_tokens"] == chat.says(sent)["usage"]["out"]


def test_open_webui_has_title_and_tags_made_while_it_chats(chat: Stage) -> None:
    assert chat.told("open_webui", "chat_with_title_and_tags")["statuses"] == [200, 200, 200]


@pytest.mark.parametrize("client", MANY)
def test_many_at_once_get_each_its_own_answer(chat: Stage, client: str) -> None:
    texts = chat.told(client, "many")["texts"]
    assert texts == [f"Number {n} of {client} many says {n * n}." for n in range(32)]
    jobs = [sent.job for sent in chat.sent(client, "many")]
    assert len(jobs) == 32
    at_once = max(
        sum(
            other.started_s <= job.started_s < other.ended_s
            for other in jobs
            if other.started_s and other.ended_s
        )
        for job in jobs
        if job.started_s
    )
    assert at_once >= 16, "they were answered one after another"
