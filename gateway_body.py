"""The JSON bodies that the gateway reads itself: of their type, or refused in words."""

from typing import TypeVar

import msgspec

from errors import RequestError

T = TypeVar("T")


def parsed(content: bytes, kind: type[T]) -> T:
    """Return a body as its type; RequestError says what is wrong, without quoting it."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise RequestError(f"the body is not as it should be: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RequestError("the body is not valid JSON") from None
