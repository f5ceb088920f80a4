"""The routes of vLLM's server that take a form, whose fields travel as members of a JSON object.

Owns how such a body becomes that form (SPEC section 8.3). Knows nothing of vLLM and of what the
fields mean.
"""

import base64
import binascii
import io
import re
import wave
from typing import Any

import msgspec
from urllib3.filepost import encode_multipart_formdata

from errors import RequestError

FORM_ROUTES = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})

_DATA_URL = re.compile(r"data:([\w.+/-]*)(?:;[\w=.+-]+)*;base64,", re.ASCII)

Field = tuple[str, str | bytes | tuple[str, bytes, str]]


def form(body: bytes) -> tuple[bytes, str]:
    """Return a body as `multipart/form-data` and its content type with the boundary.

    A list is a field that occurs several times, null none. RequestError for what is no such body.
    """
    try:
        members = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise RequestError("the body is not a JSON object with the fields of the form") from None
    if "file" not in members:
        raise RequestError("file is missing: the audio, as a data: URL", param="file")
    fields: list[Field] = [("file", _file(members.pop("file")))]
    for name, value in members.items():
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                fields.append((name, _text(item)))
    return encode_multipart_formdata(fields)


def _file(url: Any) -> tuple[str, bytes, str]:
    found = _DATA_URL.match(url) if isinstance(url, str) else None
    if found is None:
        raise RequestError("file is not a data: URL in base64", param="file")
    try:
        content = base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("file is not sound base64", param="file") from None
    return "file", content, found[1] or "application/octet-stream"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def silence(seconds: float = 0.5) -> str:
    """Return a WAV of nothing as a data: URL."""
    rate = 16_000
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(bytes(2 * int(seconds * rate)))
    return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()
