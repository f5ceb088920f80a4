"""Models of other kinds on a real engine: one that ranks, one that sees, one that hears."""

import base64
import io
import math
import socket
import struct
import threading
import wave
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from errors import RequestError
from protocol import GENERATE
from tests.engines import CHAT, Engine, ask, build, generate, started, user
from tools import tiny_models

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:::vllm"),
]


def made(kind: str, **options: str) -> Engine:
    path = tiny_models.MODELS / kind
    tiny_models.KINDS[kind](path)
    return build(path, kind, **options)


# --- a cross-encoder --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_ranker() -> Engine:
    return made("tiny-rerank")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ranker(built_ranker: Engine) -> AsyncIterator[Engine]:
    async with started(built_ranker) as engine:
        yield engine


async def test_a_cross_encoder_says_what_it_can(ranker: Engine) -> None:
    assert ranker.tasks == ("score", "classify", "pool")
    with pytest.raises(RequestError, match="can score, classify, pool, and this worker has"):
        await ask(ranker, "/v1/embeddings", {"model": "tiny-rerank", "input": "x"})


async def test_it_scores_pairs_and_ranks_by_that(ranker: Engine) -> None:
    documents = ["Paris is a city", "Bread is baked", "Rome"]
    body: dict[str, Any] = {"model": "tiny-rerank", "text_1": "Where?", "text_2": documents}
    scores = [entry["score"] for entry in (await ask(ranker, "/v1/score", body)).json["data"]]
    assert len(set(scores)) == 3
    body = {"model": "tiny-rerank", "query": "Where?", "documents": documents}
    for route in ("/v1/rerank", "/v2/rerank", "/rerank"):
        ranked = (await ask(ranker, route, body)).json["results"]
        assert [entry["index"] for entry in ranked] == sorted(range(3), key=lambda i: -scores[i])
        assert [entry["relevance_score"] for entry in ranked] == pytest.approx(
            sorted(scores, reverse=True), abs=1e-3
        )
    classes = await ask(ranker, "/classify", {"model": "tiny-rerank", "input": "Paris"})
    assert classes.json["data"][0]["num_classes"] == 1


# --- a model that sees ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_seer() -> Engine:
    return made("tiny-vision", MAX_MODEL_LEN="512")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seer(built_seer: Engine) -> AsyncIterator[Engine]:
    async with started(built_seer) as engine:
        yield engine


def image(color: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (80, 50), color).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def look(url: str, **part: Any) -> list[dict[str, Any]]:
    shown = part or {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, shown]}]


async def test_it_says_that_it_sees(seer: Engine) -> None:
    assert seer.about()["tasks"] == ["generate", "chat", "vision"]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_image_makes_the_answer(seer: Engine, stream: bool) -> None:
    answers = []
    for color in ("red", "blue", "red"):
        body = {"model": "tiny-vision", "messages": look(image(color)), "temperature": 0}
        chat = await ask(seer, CHAT, {**body, "max_tokens": 8})
        assert chat.status == 200, chat.body
        answers.append(chat.json["choices"][0]["message"]["content"])
        own = await generate(seer, messages=look(image(color)), max_tokens=8, stream=stream)
        assert own.text == answers[-1]
        assert own.usage["prompt_tokens"] == chat.json["usage"]["prompt_tokens"]
    assert answers[0] == answers[2] != answers[1]


async def test_on_the_other_routes_of_chat_too(seer: Engine) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": image("red").split(",")[1]}
    body: dict[str, Any] = {"model": "tiny-vision", "max_tokens": 4}
    messages = look("", type="image", source=source)
    assert (await ask(seer, "/v1/messages", {**body, "messages": messages})).status == 200
    body = {"model": "tiny-vision", "max_output_tokens": 16}
    parts = [{"type": "input_image", "detail": "auto", "image_url": image("red")}]
    asked = {**body, "input": [{"role": "user", "content": parts}]}
    assert (await ask(seer, "/v1/responses", asked)).status == 200


@pytest.fixture
def listening() -> Iterator[tuple[str, list[bytes]]]:
    """Yield an address of this machine and what has connected to it so far."""
    came: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                came.append(connection.recv(1000))
                connection.sendall(b"HTTP/1.0 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/a.png", came
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


async def test_nobody_is_asked_for_an_image(
    seer: Engine, listening: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, came = listening
    body = {"model": "tiny-vision", "messages": look(url), "max_tokens": 1}
    with pytest.raises(RequestError, match="fetches nothing"):
        await ask(seer, GENERATE, {"messages": look(url)})
    answer = await ask(seer, CHAT, body)
    assert answer.status == 400 and b"fetches nothing" in answer.body
    # Nor by vLLM, if that were not there; it would, had nothing been set.
    monkeypatch.setattr(type(seer.abilities), "check", lambda *_: None)
    assert (await ask(seer, CHAT, body)).status >= 400
    assert not came
    monkeypatch.setattr(seer.config.model_config, "allowed_media_domains", None)
    assert (await ask(seer, CHAT, body)).status >= 400
    assert len(came) >= 1


async def test_what_it_does_not_take_is_refused(seer: Engine) -> None:
    audio = look("", type="input_audio", input_audio={"data": "eA==", "format": "wav"})
    answer = await ask(seer, CHAT, {"model": "tiny-vision", "messages": audio})
    assert answer.status == 400
    assert "takes no audio; it can generate, chat, vision" in answer.json["error"]["message"]
    damaged = look("data:image/png;base64,eA==")
    answer = await ask(seer, CHAT, {"model": "tiny-vision", "messages": damaged})
    assert answer.status == 400
    assert (await generate(seer, messages=user("Still there?"), max_tokens=1)).end is not None


# --- a model that hears -----------------------------------------------------------------------

TRANSCRIBE = "/v1/audio/transcriptions"


@pytest.fixture(scope="module")
def built_hearer() -> Engine:
    return made("tiny-whisper")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hearer(built_hearer: Engine) -> AsyncIterator[Engine]:
    async with started(built_hearer) as engine:
        yield engine


def tone(pitch_hz: float) -> str:
    """Return a second of a tone as a data: URL."""
    rate, file = 16_000, io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        turns = (2 * math.pi * pitch_hz * n / rate for n in range(rate))
        writer.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(x))) for x in turns))
    return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()


async def test_what_it_hears_makes_the_transcript(hearer: Engine) -> None:
    assert hearer.tasks == ("transcribe",)
    texts = []
    for pitch_hz in (300, 2000, 300):
        body = {"model": "tiny-whisper", "file": tone(pitch_hz), "language": "en"}
        answer = await ask(hearer, TRANSCRIBE, {**body, "max_completion_tokens": 8})
        assert answer.status == 200, answer.body
        texts.append(answer.json["text"])
    assert texts[0] == texts[2] != texts[1]


async def test_a_transcript_streams(hearer: Engine) -> None:
    body = {"model": "tiny-whisper", "file": tone(300), "language": "en", "stream": True}
    answer = await ask(hearer, TRANSCRIBE, {**body, "max_completion_tokens": 8})
    assert answer.status == 200 and answer.head is not None and answer.head.kind == "sse"


async def test_what_cannot_be_heard_is_refused_in_words(hearer: Engine) -> None:
    for file, words in (
        ("https://example.com/a.wav", "not a data: URL"),
        ("data:audio/wav;base64,x", "not sound base64"),
        (None, "not a data: URL"),
    ):
        with pytest.raises(RequestError, match=words):
            await ask(hearer, TRANSCRIBE, {"model": "tiny-whisper", "file": file})
    with pytest.raises(RequestError, match="file is missing"):
        await ask(hearer, TRANSCRIBE, {"model": "tiny-whisper"})
    no_audio = "data:audio/wav;base64," + base64.b64encode(b"no audio").decode()
    answer = await ask(hearer, TRANSCRIBE, {"model": "tiny-whisper", "file": no_audio})
    assert answer.status == 400
    with pytest.raises(RequestError, match="can transcribe"):
        await generate(hearer, prompt="Hello")
