"""What a model can do, said and refused: without an engine."""

import base64
import json
from typing import Any

import pytest

from engine_tasks import TASKS, Abilities, refusal, tasks_of
from errors import RequestError
from protocol import GENERATE, ROUTES, Call

TEXT = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
PIXEL = "data:image/png;base64," + base64.b64encode(b"pixel").decode()


def check(abilities: Abilities, route: str, body: Any) -> None:
    abilities.check(Call(route, "POST", json.dumps(body).encode()))


def plain(**which: bool) -> dict[str, bool]:
    return {"chat": True, "tools": False, "reasoning": False, **which}


def test_the_words_follow_routes_settings_and_inputs() -> None:
    assert tasks_of(TEXT, (), **plain()) == ("generate", "chat")
    assert tasks_of(TEXT, ("image", "video"), **plain(tools=True, reasoning=True)) == (
        *("generate", "chat", "tools", "reasoning", "vision", "video"),
    )
    # Parsers are of no use to a model that cannot chat.
    assert tasks_of(TEXT, (), **plain(chat=False, tools=True, reasoning=True)) == ("generate",)
    pooling = ("/v1/embeddings", "/v1/score", "/v1/rerank", "/pooling", "/version")
    assert tasks_of(pooling, (), **plain(chat=False)) == ("embed", "score", "pool")
    assert tasks_of(["/classify", "/score"], (), **plain(tools=True)) == ("score", "classify")
    assert set(
        tasks_of(ROUTES, ("image", "audio", "video"), **plain(tools=True, reasoning=True))
    ) == (set(TASKS))
    assert tasks_of(["/version"], ("smell",), **plain()) == ()


TALKER = Abilities(("generate", "chat"), TEXT)
READER = Abilities(("generate",), TEXT)
EMBEDDER = Abilities(("embed", "score", "pool"), ("/v1/embeddings", "/v1/score", "/pooling"))
SEER = Abilities(("generate", "chat", "vision"), TEXT)


def message(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("abilities", "route", "body", "status", "says"),
    [
        (TALKER, "/v1/embeddings", {}, 404, "can generate, chat, and this worker has /v1/models"),
        (TALKER, "/v1/score", {}, 404, "can generate, chat"),
        (TALKER, "/classify", {}, 404, "can generate, chat"),
        (EMBEDDER, "/v1/chat/completions", {}, 404, "can embed, score, pool"),
        (EMBEDDER, "/v1/completions", {}, 404, "can embed"),
        (EMBEDDER, GENERATE, {"prompt": "x"}, 404, "can embed"),
        (EMBEDDER, GENERATE, {"messages": []}, 404, "can embed"),
        (READER, "/v1/chat/completions", {"messages": []}, 400, "no chat template.*can generate"),
        (READER, "/v1/responses", {"input": "x"}, 400, "no chat template"),
        (READER, "/v1/messages", {}, 400, "no chat template"),
        (READER, GENERATE, {"messages": []}, 400, "no chat template"),
        (READER, "/v1/chat/completions", {"chat_template": "x"}, 400, "no chat template"),
    ],
)
def test_a_route_for_which_the_model_is_not_made_is_refused(
    abilities: Abilities, route: str, body: dict[str, Any], status: int, says: str
) -> None:
    with pytest.raises(RequestError, match=says) as raised:
        check(abilities, route, body)
    assert raised.value.status == status


def test_what_the_model_can_do_is_not_refused() -> None:
    for abilities, route, body in (
        (TALKER, "/v1/chat/completions", {"messages": message({"type": "text", "text": "x"})}),
        (TALKER, GENERATE, {"messages": [{"role": "user", "content": "x"}]}),
        (READER, GENERATE, {"prompt": "x", "messages": None}),
        (READER, "/v1/completions", {"prompt": [1, 2]}),
        (READER, "/version", {}),
        (EMBEDDER, "/v1/embeddings", {"input": [[1, 2], "x"]}),
        (
            Abilities(("generate",), TEXT, own_chat_template=True),
            "/v1/messages",
            {"chat_template": "x"},
        ),
        # Nobody's business here; vLLM knows what to say.
        (TALKER, "/v1/chat/completions", {"messages": 5}),
        (TALKER, "/v1/chat/completions", {"messages": [[[{"type": ["image"]}]], None, "x"]}),
        (
            TALKER,
            "/v1/messages",
            {"messages": message({"type": "tool_use", "input": {"image": 1}})},
        ),
    ):
        check(abilities, route, body)


IMAGES = [
    {"type": "image_url", "image_url": {"url": PIXEL}},
    {"image_url": PIXEL},
    {"type": "input_image", "image_url": PIXEL},
    {"type": "image", "source": {"type": "base64", "data": "eA=="}},
    {"type": "tool_result", "content": [{"type": "image", "source": {"type": "base64"}}]},
    {"type": "image_embeds", "image_embeds": "eA=="},
]


@pytest.mark.parametrize("part", IMAGES, ids=str)
@pytest.mark.parametrize(
    ("route", "member"),
    [
        ("/v1/chat/completions", "messages"),
        (GENERATE, "messages"),
        ("/v1/messages", "messages"),
        ("/v1/responses", "input"),
    ],
)
def test_images_are_for_models_that_see(route: str, member: str, part: Any) -> None:
    check(SEER, route, {member: message(part)})
    with pytest.raises(RequestError, match="takes no images; it can generate, chat") as raised:
        check(TALKER, route, {member: message({"type": "text", "text": "x"}, part)})
    assert raised.value.status == 400


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            {"type": "input_audio", "input_audio": {"data": "eA==", "format": "wav"}},
            "takes no audio",
        ),
        (
            {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,eA=="}},
            "takes no audio",
        ),
        (
            {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,eA=="}},
            "takes no videos",
        ),
    ],
    ids=str,
)
def test_one_sense_is_not_the_other(part: Any, says: str) -> None:
    with pytest.raises(RequestError, match=f"{says}; it can generate, chat, vision"):
        check(SEER, "/v1/chat/completions", {"messages": message(part)})


def test_texts_to_rank_may_hold_parts_too() -> None:
    image = {"type": "image_url", "image_url": {"url": PIXEL}}
    for member in ("query", "documents", "text_1", "text_2", "data_1", "data_2", "queries"):
        for value in ({"content": [image]}, ["x", {"content": [image]}]):
            with pytest.raises(RequestError, match="takes no images"):
                check(EMBEDDER, "/v1/score", {member: value})


def pointing(url: str) -> list[dict[str, Any]]:
    """Return parts that name a URL, in each way in which one can."""
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "image", "source": {"type": "url", "url": url}},
        {"image_url": url, "uuid": "x"},
        {"type": "tool_result", "content": [{"type": "image", "source": {"url": url}}]},
    ]


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://example.com/a.png",
        "HTTPS://example.com/a.png",
        " https://example.com/a.png",
        "//example.com/a.png",
        "ftp://example.com/a.png",
        "file:///etc/passwd",
        "http://[",
        "gopher:x",
        "",
    ],
)
def test_nothing_is_fetched_that_a_request_names(url: str) -> None:
    for part in pointing(url):
        with pytest.raises(RequestError, match="fetches nothing that a request names") as raised:
            check(SEER, "/v1/chat/completions", {"messages": message(part)})
        assert raised.value.status == 400
        assert not url or url not in raised.value.message


def test_but_from_the_hosts_of_the_setting() -> None:
    allowing = Abilities(SEER.tasks, TEXT, media_domains=("images.example.com",))
    for part in pointing("https://Images.Example.com:443/a.png"):
        check(allowing, "/v1/chat/completions", {"messages": message(part)})
    for url in (
        "https://example.com/a.png",
        "https://images.example.com.evil.example/",
        "https://images.example.com@evil.example/",
        "file:///images.example.com",
    ):
        for part in pointing(url):
            with pytest.raises(RequestError, match=r"come from images\.example\.com only"):
                check(allowing, "/v1/chat/completions", {"messages": message(part)})


def test_files_only_where_the_operator_shares_a_folder() -> None:
    sharing = Abilities(SEER.tasks, TEXT, local_media=True)
    for part in pointing("file:///shared/a.png"):
        check(sharing, GENERATE, {"messages": message(part)})


def test_a_model_that_is_not_served_is_refused_with_those_that_are() -> None:
    served = Abilities(TALKER.tasks, TEXT, ("tiny", "org/adapter"))
    for model in ("tiny", "org/adapter", "", None, 5):
        check(served, GENERATE, {"prompt": "x", "model": model})
    for route in (GENERATE, "/v1/chat/completions", "/tokenize"):
        with pytest.raises(RequestError, match=r"`nope` .* this worker has tiny, org/adapter") as e:
            check(served, route, {"model": "nope"})
        assert (e.value.status, e.value.param) == (404, "model")
    check(TALKER, GENERATE, {"prompt": "x", "model": "known to a plugin of vLLM's"})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b'{"messages": NaN}', b"[" * 10_000, b"\xff"]
)
def test_what_is_no_object_is_vllms_to_refuse(body: bytes) -> None:
    TALKER.check(Call("/v1/chat/completions", "POST", body))


def test_refusals_have_the_form_of_their_route() -> None:
    error = RequestError("no", status=404, type="NotFoundError", param="model")
    assert refusal(error, "/v1/chat/completions")["error"]["code"] == 404
    assert refusal(error, "/v1/messages") == {
        "type": "error",
        "error": {"type": "NotFoundError", "message": "no"},
    }
