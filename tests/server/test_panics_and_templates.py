"""What comes with a model, its template and its tokenizer, hurts the request that meets it and nobody else."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import tokenizers
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import app_around, chat, client_of, complete, events_of, service_of

from dsc_serve.text import renderer
from dsc_serve.text.chat import ChatTemplate
from dsc_serve.text.pieces import byte_alphabet
from dsc_serve.text.tokenizer import Tokenizer

LOOPS = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"


def panic() -> Any:
    """One of a library's own: they share no class that could be imported."""
    fields = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).to_str())
    single, sequence = [{"SpecialToken": {"id": "[X]", "type_id": 0}}], {"Sequence": {"id": "A", "type_id": 0}}
    pair = [sequence, {"Sequence": {"id": "B", "type_id": 1}}]
    frame = {"type": "TemplateProcessing", "single": [*single, sequence], "pair": pair, "special_tokens": {}}
    return tokenizers.Tokenizer.from_str(json.dumps({**fields, "post_processor": frame})).encode("a")


@pytest.fixture
def looping(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """An app whose chats never come to an end where they say "loop"."""
    monkeypatch.setattr(renderer, "CPU_S", 1.0)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    template = f"{{% if messages[0].content == 'loop' %}}{LOOPS}{{% endif %}}hi"
    return app_around(engine, Tokenizer(backend, chat_template=ChatTemplate(template, {})))


@pytest.mark.parametrize(
    ("path", "fields"), [("/v1/chat/completions", {"max_tokens": 2}), ("/tokenize", {"add_generation_prompt": True})]
)
def test_a_template_that_never_ends_holds_nobody_else_up(looping: FastAPI, path: str, fields: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "loop"}]

    async def run() -> None:
        async with client_of(looping) as client:
            bad = asyncio.create_task(client.post(path, json={"messages": messages, **fields}))
            others = 0
            while not bad.done():
                completed = await client.post("/v1/completions", json={"prompt": [1], "max_tokens": 2})
                assert completed.status_code == 200
                others += 1
                await asyncio.sleep(0.01)
            refused = (await bad).json()["error"]
            assert (refused["code"], refused["param"]) == ("invalid_value", "messages")
            assert "takes more than" in refused["message"] and "of processor time" in refused["message"]
            assert others >= 3, "nobody was answered before the template was given up"

    asyncio.run(run())
    assert service_of(looping).permits.held == 0
    assert chat(looping, max_tokens=2).status_code == 200


class Panicking(Tokenizer):
    """Panics where a text is encoded or decoded, as asked."""

    encodes = decodes = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return panic() if self.encodes else super().encode(text, add_special_tokens)

    def shown_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        return panic() if self.decodes and token_id == ord("c") else super().shown_bytes(token_id, skip_special_tokens)


@pytest.fixture
def panicking(engine: FakeEngine, tokenizer: Tokenizer) -> tuple[FastAPI, Panicking]:
    made = Panicking(tokenizer._backend, eos_token_id=256, chat_template=tokenizer.chat_template)
    return app_around(engine, made), made


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_panic_before_an_answer_has_the_form_of_every_error(
    panicking: tuple[FastAPI, Panicking], path: str, caplog: pytest.LogCaptureFixture
) -> None:
    app, tokenizer = panicking
    tokenizer.encodes = True

    async def run() -> None:
        async with client_of(app) as client:
            response = await client.post(path, json={"prompt": "hi"})
            assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")

    asyncio.run(run())
    assert "the server failed on a request" in caplog.text
    assert service_of(app).permits.held == 0
    tokenizer.encodes = False
    assert complete(app, max_tokens=2).status_code == 200


@pytest.mark.parametrize("n", [1, 3])
def test_a_panic_midway_ends_a_stream_as_every_error_does(
    panicking: tuple[FastAPI, Panicking], engine: FakeEngine, n: int
) -> None:
    app, tokenizer = panicking
    tokenizer.decodes = True
    assert complete(app, max_tokens=8, n=n).status_code == 500
    events = events_of(complete(app, max_tokens=8, stream=True, n=n))
    assert events[-1]["error"]["type"] == "server_error"
    assert engine.running == 0
    tokenizer.decodes = False
    assert complete(app, max_tokens=8).status_code == 200


def test_a_panic_of_the_tokenizer_s_library_is_the_text_s_error(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    class Backend:
        """Looks like a library's, and panics."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer._backend, name)

        def encode_batch(self, texts: list[str], **options: Any) -> Any:
            return panic() if texts != [""] and "é" in texts[0] else tokenizer._backend.encode_batch(texts, **options)

    app = app_around(engine, Tokenizer(Backend(), eos_token_id=256))  # type: ignore[arg-type]
    refused = complete(app, prompt="é")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert (
        "the text cannot be encoded: a library panicked: no entry found for key" in refused.json()["error"]["message"]
    )
