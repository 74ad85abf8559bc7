"""Paths: a slash at the end changes nothing, also not who may ask; and none of this machine's is told to clients."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import app_around, ask, client_of, complete, events_of

from dsc_serve.config import AccessConfig
from dsc_serve.server.errors import without_paths
from dsc_serve.server.keys import KeyRing
from dsc_serve.text.tokenizer import Tokenizer

KEY = "k" * 16
ROUTES = [
    ("GET", "/health"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("GET", "/v1/models/other"),
    ("GET", "/admin/state"),
    ("GET", "/admin/tenants"),
    ("GET", "/openapi.json"),
    ("GET", "/unknown"),
    ("GET", "/v1/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/dsc/trace"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("key", [None, KEY])
def test_a_slash_at_the_end_changes_nothing(
    engine: FakeEngine, tokenizer: Tokenizer, method: str, path: str, key: str | None
) -> None:
    app = app_around(engine, tokenizer, KeyRing("", f"me:{KEY}"), AccessConfig(metrics_key=True))
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {"prompt": "x"} if method == "POST" else None
    plain, *others = (ask(app, method, path + end, headers=headers, json=body) for end in ("", "/", "//"))
    for answer in others:
        assert answer.status_code == plain.status_code
        assert answer.headers.get("www-authenticate") == plain.headers.get("www-authenticate")
        if plain.status_code >= 400:
            assert answer.json() == plain.json()


def test_requests_are_counted_under_one_path(app: FastAPI) -> None:
    async def run() -> str:
        async with client_of(app) as client:
            for path in ("/v1/models", "/v1/models/", "/v1/models//"):
                await client.get(path)
            return (await client.get("/metrics/")).text

    assert 'dsc_serve_requests_total{endpoint="/v1/models",status="200"} 3.0' in asyncio.run(run())


class Leaky(FakeEngine):
    """Its trouble names a folder of this machine."""

    words = "the engine cannot read '/srv/my models/secret/model.safetensors' and /etc/dsc/config.json: no such file"

    @property
    def trouble(self) -> str:
        return self.words


def test_what_a_health_check_says_names_no_folder(tokenizer: Tokenizer) -> None:
    engine = Leaky()
    engine.gave_up = True
    for path in ("/health/live", "/health/ready", "/health"):
        answer = ask(app_around(engine, tokenizer), "GET", path)
        assert answer.status_code == 503
        message = answer.json()["error"]["message"]
        assert "…/model.safetensors" in message and "…/config.json" in message
        assert not any(word in message for word in ("srv", "models", "secret", "etc", "dsc"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_request_names_no_folder(app: FastAPI, engine: FakeEngine, stream: bool) -> None:
    engine.fail_after = 1
    engine.error.error = "the step failed: OSError: /var/cache/triton/abc/kernel.so: cannot open"
    answer = complete(app, stream=stream)
    text = answer.text if stream else answer.json()["error"]["message"]
    assert "…/kernel.so" in text and "/var" not in text
    if stream:
        assert events_of(answer)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/a/b/c.json is missing", "…/c.json is missing"),
        ("file '/a b/c d/e.json' is", "file '…/e.json' is"),
        ("(/a/b.py:12)", "(…/b.py:12)"),
        ("[Errno 2] No such file: '/x/y'", "[Errno 2] No such file: '…/y'"),
        ("2 GB/s and/or 3/4 of it", "2 GB/s and/or 3/4 of it"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("dsc_serve/model/x.py", "dsc_serve/model/x.py"),
    ],
)
def test_paths_are_cut_down_to_their_last_part(text: str, shown: str) -> None:
    assert without_paths(text) == shown
