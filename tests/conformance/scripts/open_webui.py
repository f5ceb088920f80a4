"""Open WebUI's calls, replayed over the HTTP client that it uses; see harness.py.

It is gigabytes to install. What it sends is taken from its documentation (connections to
OpenAI-compatible servers, task models, MODELS list time-out) and its open source: GET /models
with ten seconds' patience, chats streamed with usage, titles and tags in the background not
streamed, and a closed connection for Stop. It copies the events to the browser as they come, and
shows the message of an error with a status.
"""

import asyncio
import json
from typing import Any

import aiohttp
from harness import API_KEY, BASE_URL, MODEL, Facts, asked, main, prompt, scenario

HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
MODELS_TIMEOUT_S = 10


def streamed(name: str, **options: Any) -> Facts:
    """Return the body of a chat as a person has it."""
    return asked(name, stream=True, stream_options={"include_usage": True}, **options)


async def post(body: Facts) -> tuple[int, str, str]:
    """Return status, content type and text of an answer."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{BASE_URL}/chat/completions", json=body, headers=HEADERS) as response,
    ):
        return response.status, response.content_type, await response.text()


def events(text: str) -> list[Any]:
    """Return the events of a stream; its comments are not among them."""
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


@scenario
async def models() -> Facts:
    """Its poll: with a key of its own, and no body."""
    timeout = aiohttp.ClientTimeout(total=MODELS_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with (
        aiohttp.ClientSession(timeout=timeout, trust_env=True) as session,
        session.get(f"{BASE_URL}/models", headers=headers) as response,
    ):
        listed = await response.json()
    return {"object": listed["object"], "models": [model["id"] for model in listed["data"]]}


@scenario
async def chat() -> Facts:
    body = streamed("chat")
    status, kind, text = await post(body)
    found = events(text)
    chunks = [event for event in found if event != "[DONE]"]
    pieces = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return {
        "asked": body,
        "status": status,
        "kind": kind,
        "done": found[-1] == "[DONE]" and found.count("[DONE]") == 1,
        "usage": chunks[-1]["usage"],
        "chunks": len(chunks),
        "text": "".join(piece.get("content") or "" for piece in pieces),
    }


async def task(name: str, text: str, **options: Any) -> Facts:
    """A call in the background: what it needs of a chat, as a prompt of one message."""
    content = f"### Task:\n{text}\n### Chat History:\nUSER: {prompt(name)}"
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "stream": False,
        "temperature": 0,
        "max_completion_tokens": 24,
        **options,
    }
    status, kind, answer = await post(body)
    choice = json.loads(answer)["choices"][0]
    return {"asked": body, "status": status, "kind": kind, "text": choice["message"]["content"]}


@scenario
async def title() -> Facts:
    return await task("title", "Generate a concise, 3-5 word title summarizing the chat.")


@scenario
async def tags() -> Facts:
    return await task("tags", "Generate 1-3 broad tags categorizing the main themes of the chat.")


@scenario
async def unknown_model() -> Facts:
    status, kind, text = await post(streamed("unknown_model", model="nobody"))
    return {"status": status, "kind": kind, "body": json.loads(text)}


@scenario
async def cancelled() -> Facts:
    """Stop: the connection is closed in the middle of the stream."""
    body = streamed("cancelled", ignore_eos=True)
    body["max_tokens"] = 1500
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{BASE_URL}/chat/completions", json=body, headers=HEADERS) as response,
    ):
        read = 0
        async for line in response.content:
            read += line.startswith(b"data: ")
            if read == 3:
                break
        response.close()
    return {"chunks": read}


@scenario
async def broken() -> Facts:
    body = streamed("broken")
    body["max_tokens"] = 300
    _, _, text = await post(body)
    found = events(text)
    return {"done": "[DONE]" in found, "last": found[-1]}


@scenario
async def chat_with_title_and_tags() -> Facts:
    """What one message of a person sets off, all at once."""
    found = await asyncio.gather(
        task("burst-title", "Generate a title."),
        task("burst-tags", "Generate tags."),
        post(streamed("burst-chat")),
    )
    return {"statuses": [found[0]["status"], found[1]["status"], found[2][0]]}


if __name__ == "__main__":
    main()
