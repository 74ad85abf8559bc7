"""An engine without a model, a tokenizer of bytes, and the app around them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tokenizers
from fastapi import FastAPI
from support.access import Write
from support.fake_engine import FakeEngine
from support.serving import app_around
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from dsc_serve.text.chat import ChatTemplate
from dsc_serve.text.pieces import byte_alphabet
from dsc_serve.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'refuse me' %}{{ raise_exception('these messages are refused') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token for each byte, of that byte's number, and the special token 256."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Tokenizer(backend, eos_token_id=256, chat_template=ChatTemplate(TEMPLATE, {}))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def app(engine: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    return app_around(engine, tokenizer)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the key file, so that its time differs from what it was before."""

    def file(text: str) -> str:
        path = tmp_path / "keys.toml"
        before = path.stat().st_mtime_ns if path.exists() else 0
        path.write_text(text)
        os.utime(path, ns=(before + 10**9, before + 10**9))
        return str(path)

    return file
