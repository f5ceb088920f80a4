"""The status page at `/` for people: three files of `page/`, served as they are.

Owns their headers: a Content-Security-Policy that lets the page load nothing from
elsewhere, run no script but its own and make no markup out of text, and an ETag
by content. Knows nothing of what the page shows; it asks `/api/status` and
`/v1/chat/completions` itself, like any other client. The files hold nothing
private, so they are served without the local key: the page asks for it.
"""

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

FOLDER = Path(__file__).with_name("page")
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""Path to file and media type."""

_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    # Browsers that know these refuse innerHTML and its like altogether.
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
_HEADERS = {
    "Content-Security-Policy": "; ".join(_POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Other sites could otherwise load the script to find out that a gateway runs here.
    "Cross-Origin-Resource-Policy": "same-origin",
    # Ask each time: a newer gateway on the same port brings a newer page.
    "Cache-Control": "no-cache",
}


def routes() -> list[BaseRoute]:
    """Return the routes of the page; OSError where its files are missing."""
    return [_route(path, name, media_type) for path, (name, media_type) in FILES.items()]


def _route(path: str, name: str, media_type: str) -> Route:
    content = (FOLDER / name).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": etag}

    async def serve(request: Request) -> Response:
        if _holds(request.headers.get("if-none-match", ""), etag):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return Route(path, serve, name=name)


def _holds(given: str, etag: str) -> bool:
    """Whether an If-None-Match names the ETag; compared weakly, as RFC 9110 section 13.1.2 asks."""
    return etag in {tag.strip().removeprefix("W/") for tag in given.split(",")} or given == "*"
