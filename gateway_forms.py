"""Forms that clients send to the routes of audio, as the JSON bodies that a worker takes.

Nothing of a form touches the disk. Knows nothing of routes.
"""

import base64
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from errors import RequestError


async def json_of(headers: Headers, content: bytes) -> bytes:
    """Return a `multipart/form-data` body as a JSON object, files in it as data: URLs.

    RequestError for a form that is damaged.
    """

    async def stream() -> AsyncGenerator[bytes, None]:
        yield content

    parser = MultiPartParser(headers, stream(), max_part_size=len(content))
    parser.spool_max_size = len(content) + 1  # a file beyond it would be spooled to the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise RequestError(f"the form is damaged: {error}") from None
    body: dict[str, Any] = {}
    for name in dict.fromkeys(form):
        values = [await _value(value) for value in form.getlist(name)]
        body[name] = values if name.endswith("[]") or len(values) > 1 else values[0]
    if isinstance(body.get("stream"), str):
        body["stream"] = body["stream"].lower() in ("true", "1")
    return msgspec.json.encode(body)


async def _value(value: UploadFile | str) -> str:
    if isinstance(value, str):
        return value
    content = base64.b64encode(await value.read()).decode()
    return f"data:{value.content_type or 'application/octet-stream'};base64,{content}"
