"""The page at `/`: files that a browser reads, sent as they lie here. It needs no key; the calls that it makes do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import Response

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
INDEX = "index.html"
FOLDER = "/page/"  # where all but the index lie
# Nothing from elsewhere, nothing within the document, and no text ever becomes markup (trusted types).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked about every time: a new version shows at once
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class PageFile:
    """One file under its path; etag is a hash of its bytes."""

    path: str
    body: bytes
    media_type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'

    async def answer(self, request: Request) -> Response:
        """The file, or 304 where the client has it already."""
        headers = {**HEADERS, "ETag": self.etag}
        if self.known_to(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers, media_type=self.media_type)

    def known_to(self, tags: str) -> bool:
        """As RFC 9110 compares what If-None-Match lists: weakly, since proxies that compress weaken a tag."""
        listed = {tag.strip().removeprefix("W/") for tag in tags.split(",")}
        return self.etag in listed or "*" in listed


def page_files(root_path: str) -> Iterator[PageFile]:
    """All files of the page; the index says under which path of a proxy's the others, and the API, are."""
    for entry in sorted(resources.files(__package__).iterdir(), key=lambda entry: entry.name):
        suffix = "." + entry.name.rpartition(".")[2]
        if suffix not in MEDIA_TYPES:
            continue
        body = entry.read_bytes()
        if entry.name == INDEX and root_path:
            body = body.replace(b"<head>", f'<head>\n<base href="{escape(root_path)}/">'.encode(), 1)
        yield PageFile("/" if entry.name == INDEX else FOLDER + entry.name, body, MEDIA_TYPES[suffix])


def paths() -> frozenset[str]:
    """What the page consists of."""
    return frozenset(file.path for file in page_files(""))


def install(app: FastAPI, root_path: str) -> None:
    """Serve the page from `app`. root_path: the path of the app behind a proxy, "" or one that begins with a slash."""
    for file in page_files(root_path):
        app.add_route(file.path, file.answer, methods=["GET"], include_in_schema=False)
