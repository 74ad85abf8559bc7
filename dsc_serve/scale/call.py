"""One HTTP request on its way from the door to a replica, and the parts of its answer on the way back."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.types import Scope

from dsc_serve.scale.placement import PlacementKey, chain_of

HOP_HEADERS = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade"})
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Call:
    """A request with its whole body."""

    method: str
    path: str
    query: bytes  # as it stood in the address
    headers: Headers
    body: bytes
    client: tuple[str, int] | None
    placement: PlacementKey

    @classmethod
    def of(cls, request: Request, body: bytes) -> Call:
        scope = request.scope
        return cls(
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"],
            headers=[(name, value) for name, value in scope["headers"] if name not in HOP_HEADERS],
            body=body,
            client=scope["client"],
            placement=placement_key(request.headers.get("authorization", ""), body),
        )

    def scope(self) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": self.headers,
            "client": self.client,
            "server": None,
        }


@dataclass(frozen=True)
class Taken:
    """A replica has the request; nothing of the answer exists yet."""

    replica: str


@dataclass(frozen=True)
class AnswerPart:
    """A piece of the answer."""

    body: bytes
    last: bool  # nothing follows
    status: int = 0  # with the first piece alone; 0 with others
    headers: Headers | None = None  # likewise; None with others


class SharedAdapters(msgspec.Struct):
    """Of the `dsc` object, what says which weights compute the prompt."""

    adapters: msgspec.Raw = msgspec.Raw(b"")
    composition: msgspec.Raw = msgspec.Raw(b"")


class SharedFields(msgspec.Struct):
    """The fields that say what a request shares with others; the replica checks them."""

    prompt: msgspec.Raw = msgspec.Raw(b"")
    messages: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    tools: msgspec.Raw = msgspec.Raw(b"")
    instructions: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    user: str | None = None
    cache_salt: str | None = None
    model: str | None = None
    dsc: SharedAdapters | None = None


decoder = msgspec.json.Decoder(SharedFields)


def placement_key(authorization: str, body: bytes) -> PlacementKey:
    """Whose a request is (API key and `user`), and the chain of its prompt as the client wrote it.

    A body that cannot be read has no chain: its replica says what is wrong with it.
    """
    tenant = authorization
    try:
        asked = decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return PlacementKey(tenant)
    if asked.user:
        tenant = f"{tenant} {asked.user}"
    messages = [] if asked.messages is msgspec.UNSET else asked.messages
    # In the order in which templates write them: chats with other tools have another beginning.
    chat = b"".join(map(bytes, (asked.tools, asked.instructions, *messages, asked.input)))
    prompt = chat or bytes(asked.prompt)
    return PlacementKey(tenant, chain_of(prompt, salt_of(asked)))


def salt_of(asked: SharedFields) -> bytes:
    """What two requests must have in common for one to use what the other has computed: the adapters, too.

    Each part stands behind its length, so that a salt cannot spell an adapter's name.
    """
    own = asked.dsc or SharedAdapters()
    parts = (
        (asked.cache_salt or "").encode(),
        (asked.model or "").encode(),
        bytes(own.adapters),
        bytes(own.composition),
    )
    return b"".join(b"%d:%b" % (len(part), part) for part in parts) if any(parts) else b""
