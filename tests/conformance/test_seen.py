"""The platform saw nothing of what the clients said and were told."""

import base64
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conformance.stage import (
    ANSWERED,
    COMMANDS,
    OTHER,
    WINDOW,
    Stage,
    canary,
    carried_by,
    readable,
)


def texts_of(told: Any) -> Iterator[str]:
    """Yield every text of an answer that a client told."""
    if isinstance(told, str):
        yield told
    elif isinstance(told, list):
        for item in told:
            yield from texts_of(item)
    elif isinstance(told, dict):
        for name in told.keys() & {"text", "texts", "first", "choices"}:
            yield from texts_of(told[name])


PROMPT = "My name is tourmaline-somebody-something. Tell me about the sea."


@pytest.mark.parametrize("shift", range(3))
@pytest.mark.parametrize("encode", [bytes, base64.b64encode], ids=["plain", "base64"])
def test_the_search_finds_a_text(shift: int, encode: Callable[[bytes], bytes]) -> None:
    carried = os.urandom(1000) + encode(b"?" * shift + PROMPT.encode()[20:40]) + os.urandom(1000)
    assert readable({PROMPT}, carried)
    assert not readable({PROMPT}, os.urandom(100_000) + base64.b64encode(os.urandom(100_000)))


@pytest.mark.engine
def test_the_platform_saw_neither_prompts_nor_answers(chat: Stage) -> None:
    told = {
        (client, name): chat.told(client, name)
        for client in COMMANDS
        for name in (*ANSWERED[client], *OTHER[client])
    }
    texts = {text for facts in told.values() for text in texts_of(facts) if len(text) >= WINDOW}
    assert len(texts) > 100
    prompts = {f"My name is {canary(client, name)}" for client, name in told}
    assert not readable(texts | prompts, carried_by(chat.platform))
    for exchange in chat.platform.exchanged:
        if exchange.direction == "client → platform" and exchange.path.endswith("/run"):
            assert json.loads(exchange.body)["input"].keys() == {"sealed"}
    for log in (chat.gateway.log, chat.gateway.banner, chat.worker.log):
        assert "tourmaline" not in log
