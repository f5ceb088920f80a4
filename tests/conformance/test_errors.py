"""What the clients made of refusals, of leaving, and of answers that break off."""

import json

import pytest

from local_runpod_queue import Status
from tests.conformance.stage import OTHER, Stage
from tests.wait import until

pytestmark = pytest.mark.engine

BROKEN = [
    ("openai_python", "broken"),
    ("openai_python", "broken_completion"),
    ("openai_python", "broken_response"),
    ("openai_node", "broken"),
    ("langchain_", "broken"),
    ("anthropic_", "broken"),
    ("llm_cli", "broken"),
    ("open_webui", "broken"),
]


@pytest.mark.parametrize(
    ("client", "name", "error", "status"),
    [
        ("openai_python", "unknown_model", "NotFoundError", 404),
        ("openai_python", "unknown_model_streamed", "NotFoundError", 404),
        ("openai_python", "too_long", "BadRequestError", 400),
        ("openai_node", "unknown_model", "NotFoundError", 404),
        ("openai_node", "too_long", "BadRequestError", 400),
    ],
)
def test_the_workers_refusal_becomes_the_sdks_error(
    chat: Stage, client: str, name: str, error: str, status: int
) -> None:
    told = chat.told(client, name)
    (sent,) = chat.sent(client, name)
    assert (told["error"], told["status"]) == (error, status)
    assert told["body"] == chat.refusal(sent).body()["error"]


@pytest.mark.parametrize(
    ("name", "error"), [("unknown_model", "NotFoundError"), ("too_long", "BadRequestError")]
)
def test_anthropics_sdk_is_told_in_its_own_form(chat: Stage, name: str, error: str) -> None:
    told = chat.told("anthropic_", name)
    (sent,) = chat.sent("anthropic_", name)
    refusal = chat.refusal(sent)
    assert told["error"] == error
    assert told["body"]["type"] == "error"
    assert told["body"]["error"] == {"type": refusal.type, "message": refusal.message}


@pytest.mark.parametrize("client", ["openai_python", "openai_node", "anthropic_"])
def test_a_wrong_local_key_is_refused_and_no_job_is_sent(chat: Stage, client: str) -> None:
    told = chat.told(client, "wrong_key")
    assert (told["error"], told["status"]) == ("AuthenticationError", 401)
    assert "GATEWAY_KEY" in json.dumps(told["body"])
    with pytest.raises(AssertionError, match="no job of"):
        chat.sent(client, "wrong_key")


def test_the_other_clients_show_the_workers_message(chat: Stage) -> None:
    said = "The model `nobody` does not exist"
    assert said in chat.told("langchain_", "unknown_model")["message"]
    assert said in chat.told("instructor_", "unknown_model")["message"]
    assert said in chat.told("open_webui", "unknown_model")["body"]["error"]["message"]
    assert chat.told("open_webui", "unknown_model")["status"] == 404
    llm = chat.told("llm_cli", "unknown_model")
    assert llm["code"] == 1 and said in llm["note"]


@pytest.mark.parametrize(
    "client", [client for client, names in OTHER.items() if "cancelled" in names]
)
def test_a_client_that_leaves_takes_its_job_along(chat: Stage, client: str) -> None:
    assert chat.told(client, "cancelled")["chunks"]
    (sent,) = chat.sent(client, "cancelled")
    until(lambda: sent.job.status is Status.CANCELLED, 10, f"cancelled, not {sent.job.status}")


@pytest.mark.parametrize(("client", "name"), BROKEN)
def test_an_answer_that_breaks_off_is_an_error(chat: Stage, client: str, name: str) -> None:
    # Late enough for what came before it to have begun the answer.
    fault = chat.platform.faults.add(
        "job-stream", nth=3, delay_s=1.0, tamper=lambda body: body.replace(b"gAAAA", b"gBBBB", 1)
    )
    try:
        told = chat.run(client, name)[name]
        assert fault.hits == 1
    finally:
        chat.platform.faults.clear()
    assert "raised" not in told, told["where"]
    (sent,) = chat.sent(client, name)
    whole = chat.says(sent)["text"]
    if client == "llm_cli":
        assert told["code"] == 1 and "Error" in told["note"], told
        assert told["text"] and whole.startswith(told["text"].rstrip("\n"))
    elif client == "open_webui":
        assert not told["done"]
        assert told["last"]["error"]["message"]
    else:
        assert told["error"], "the client took a part for the whole"
        assert told["text"] and whole.startswith(told["text"]) and told["text"] != whole
        assert "chunk" in json.dumps(told), told
