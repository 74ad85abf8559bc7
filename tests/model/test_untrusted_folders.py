"""A model folder may come from anywhere: it is served, or refused in one line and at little cost."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.small_models import SMALL_FFN

from dsc_serve.config import ConfigError, EngineConfig
from dsc_serve.engine import room
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.model.config import CheckpointError
from dsc_serve.model.source import ModelSource
from dsc_serve.text.tokenizer import Tokenizer, TokenizerError

ROOM = 300 * 2**20
Build = Callable[..., Path]


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Only so much more than now: what asks for more gets a MemoryError, which is none of the errors expected."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(folder: Path, **settings: Any) -> str:
    """In which words."""
    with little_memory(), pytest.raises((CheckpointError, ConfigError)) as error:
        prepare_model(EngineConfig(model=str(folder), **settings))
    words = str(error.value)
    assert "\n" not in words and len(words) < 1500
    return words


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    ffn = {name.removeprefix("ffn_"): fields.pop(name) for name in list(fields) if name.startswith("ffn_")}
    (folder / "config.json").write_text(json.dumps({**config, **fields, "ffn": {**config["ffn"], **ffn}}))


@pytest.mark.parametrize("value", [10**8, 2**27, 10**18, 10**30, 10**4000, -1, 1.5, "2", None, [2], True])
@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "ffn_num_atoms",
        "ffn_atoms_per_token",
        "ffn_static_size",
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_taken(
    small_model: Build, field: str, value: Any
) -> None:
    folder = small_model()
    change(folder, **{field: value})
    refused(folder)


@pytest.mark.parametrize(
    ("kind", "field"),
    [("moe", "num_experts"), ("moe", "expert_size"), ("molora", "num_adapters"), ("molora", "rank"), ("dense", "size")],
)
@pytest.mark.parametrize("value", [2**14, 2**27, 10**18])
def test_so_are_those_of_every_kind_of_layer(small_model: Build, kind: str, field: str, value: int) -> None:
    folder = small_model(kind)
    change(folder, num_hidden_layers=4096, **{f"ffn_{field}": value})
    refused(folder)


def test_what_is_refused_names_the_field_the_value_and_what_is_allowed(small_model: Build) -> None:
    folder = small_model()
    change(folder, num_hidden_layers=100_000_000)
    assert "num_hidden_layers: Input should be less than or equal to 4096 (got 100000000)" in refused(folder)
    change(folder, num_hidden_layers=4096)
    assert "num_hidden_layers is 4096, and the FFN of each has" in refused(folder)
    change(folder, num_hidden_layers=2, unknown=["x" * 10_000] * 100)
    assert "unknown: Extra inputs are not permitted (got ['xxx" in refused(folder)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads weights fails."""
    for name in ("weights", "stored_weights"):
        monkeypatch.setattr(ModelSource, name, lambda *_: pytest.fail("the weights were read"))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("kind", SMALL_FFN)
def test_who_reads_the_weights_is_seen_to(small_model: Build, kind: str) -> None:
    """So that it means something where nobody is."""
    with pytest.raises(pytest.fail.Exception, match="the weights were read"):
        prepare_model(EngineConfig(model=str(small_model(kind))))


@pytest.mark.usefixtures("unread")
def test_positions_beyond_memory_are_refused_before_the_weights_are_read(
    small_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_model()
    monkeypatch.setattr(room, "available_memory", lambda: 8 * 2**30)
    change(folder, max_position_embeddings=100_000_000)
    assert "max_position_embeddings is 100000000, for which tables of" in refused(folder, max_running=256)
    change(folder, max_position_embeddings=20_000_000, num_hidden_layers=40)
    assert "one context must fit" in refused(folder)
    change(folder, max_position_embeddings=48, num_hidden_layers=2)
    assert "kv_tokens is 1000000000: 62500000 blocks of 16 tokens take" in refused(folder, kv_tokens=10**9)
    assert "lower it or block_size" in refused(folder, kv_tokens=10**8, block_size=4096)


DOCUMENTS = {
    "deep lists": '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "unclosed": "[" * 200_000,
    "many digits": '{"a": ' + "9" * 5_000 + "}",
    "no object": "[1, 2]",
    "nothing": "",
    "not UTF-8": "\udcff",
    "a null": "null",
}
READERS: dict[str, Callable[[Path], object]] = {
    "config.json": lambda folder: prepare_model(EngineConfig(model=str(folder))),
    "generation_config.json": lambda folder: prepare_model(EngineConfig(model=str(folder))),
    "model.safetensors.index.json": lambda folder: prepare_model(EngineConfig(model=str(folder))),
    "tokenizer_config.json": Tokenizer.load,
    "tokenizer.json": Tokenizer.load,
}


def with_tokenizer(folder: Path) -> Path:
    fields = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("document", [*DOCUMENTS, "a folder", "a pipe"])
@pytest.mark.parametrize("name", READERS)
def test_documents_of_any_form_are_refused_in_one_line(small_model: Build, name: str, document: str) -> None:
    path = with_tokenizer(small_model()) / name
    path.unlink(missing_ok=True)
    if name == "model.safetensors.index.json":  # beside the whole it is left from before, and not looked at
        path.with_name("model.safetensors").unlink()
    if document in DOCUMENTS:
        path.write_bytes(DOCUMENTS[document].encode("utf-8", "surrogateescape"))
    elif document == "a folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    if name.startswith("tokenizer") and not path.is_file():
        READERS[name](path.parent)  # as if there were none
        return
    with little_memory(), pytest.raises((CheckpointError, TokenizerError), match=name) as error:
        READERS[name](path.parent)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500


def test_a_tokenizer_that_panics_or_has_giant_ids_is_refused_in_one_line(small_model: Build) -> None:
    folder = with_tokenizer(small_model())
    fields = json.loads((folder / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    frame = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}}
    (folder / "tokenizer.json").write_text(json.dumps({**fields, "post_processor": frame}))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: a library panicked: no entry found for key"):
        Tokenizer.load(folder)
    model = {"type": "BPE", "vocab": {"a": 2**32 - 2}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({**fields, "model": model}))
    with little_memory(), pytest.raises(TokenizerError, match=r"it has a token of id 4294967294; allowed: 0 to"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("kind", SMALL_FFN)
def test_what_is_as_it_should_be_is_served(small_model: Build, kind: str) -> None:
    prepare_model(EngineConfig(model=str(small_model(kind))))
