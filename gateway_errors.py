"""What an error looks like to a client of the gateway: OpenAI's form, or Anthropic's on its route.

Owns these two forms. Which HTTP status an error has is the error's own matter (errors.py).
"""

import re
from typing import Any

from starlette.responses import JSONResponse, Response

from errors import RequestError, SealedError

ANTHROPIC_ROUTES = frozenset({"/v1/messages", "/v1/messages/count_tokens"})

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""By status, as on https://docs.anthropic.com/en/api/errors; all others are `api_error`."""


def error_body(error: SealedError, route: str = "") -> dict[str, Any]:
    """Return the error object of a route's own form."""
    if route in ANTHROPIC_ROUTES:
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    if isinstance(error, RequestError):
        return error.body()
    name = type(error).__name__
    code = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    return {"error": {"message": str(error), "type": name, "param": None, "code": code}}


def error_response(
    error: SealedError, route: str = "", headers: dict[str, str] | None = None
) -> Response:
    """Return an error as an HTTP answer."""
    return JSONResponse(error_body(error, route), error.status, headers)
