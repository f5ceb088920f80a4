"""Embeddings by the clients that have them, as floats and as base64."""

import base64
import struct
from collections.abc import Iterator

import pytest

from tests.conformance.stage import Stage, carried_by, readable, staged

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stage with a model that embeds."""
    with staged(tmp_path_factory.mktemp("embed"), RUNNER="pooling", CONVERT="embed") as stage:
        yield stage


def floats(embedding: str | list[float]) -> list[float]:
    """Return an embedding's numbers, in whichever form it came."""
    if isinstance(embedding, list):
        return embedding
    return [number for (number,) in struct.iter_unpack("<f", base64.b64decode(embedding))]


@pytest.mark.parametrize("client", ["openai_python", "openai_node", "langchain_"])
def test_embeddings_are_the_workers_own(embed: Stage, client: str) -> None:
    told = embed.run(client, "embeddings")["embeddings"]
    assert "raised" not in told, told["where"]
    sent = embed.sent(client, "embeddings")
    # LangChain asks for base64 too, and hands out floats.
    answer = embed.answer(sent[-1]).json()
    vectors = [pytest.approx(floats(entry["embedding"]), abs=1e-6) for entry in answer["data"]]
    assert len(vectors) == 2
    assert told["floats"] == vectors
    if client != "langchain_":
        assert told["packed"] == vectors
        assert [each.body["encoding_format"] for each in sent] == ["base64", "float"]
    assert not readable(set(told["asked"]["input"]), carried_by(embed.platform))
