"""A GGUF file and a Hugging Face folder, named on the command line: nothing is imported, nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from model.test_import_gguf import byte_level_vocabulary, config, write
from support.foreign import huggingface_folder
from support.running_server import RunningServer, start_server, stop_server
from support.small_models import wide_tensors

from dsc_serve import LLM, SamplingParams
from dsc_serve.cli import main
from dsc_serve.model.checkpoint import load_tensors, open_source
from dsc_serve.model.folder import write_source

MODEL = config(max_position_embeddings=256)
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "old": {"type": "boolean"}},
    "required": ["kind", "old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as a GGUF file and as a folder of Hugging Face's form."""
    root = tmp_path_factory.mktemp("models")
    file = root / "file" / "small.gguf"
    file.parent.mkdir()
    write(file, wide_tensors(MODEL), MODEL, byte_level_vocabulary())
    source = open_source(file)
    write_source(source, root / "imported", torch.float32)
    tensors = load_tensors([root / "imported" / "model.safetensors"])
    sizes: dict[str, Any] = {"vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    ends = {"eos_token_id": list(source.config.eos_token_ids), "max_position_embeddings": 256}
    folder = huggingface_folder(root / "small", tensors, **sizes, **ends, tie_word_embeddings=True)
    for name, text in source.texts().items():
        (folder / name).write_text(text)
    return {"file": file, "folder": folder}


def content(path: Path) -> dict[Path, bytes]:
    return {own: own.read_bytes() for own in (path if path.is_dir() else path.parent).iterdir()}


@pytest.fixture(scope="module", params=["file", "folder"])
def server(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[RunningServer]:
    path = models[request.param]
    before = content(path)
    running = start_server(str(path), "--context", "200")
    yield running
    assert stop_server(running) == 0
    assert content(path) == before


def test_it_chats_by_its_own_template_and_follows_a_schema(server: RunningServer) -> None:
    (listed,) = server.get("/v1/models").json()["data"]
    assert (listed["id"], listed["max_model_len"]) == ("small", 200)
    messages = [{"role": "user", "content": "Hello"}]
    form = {"json": SCHEMA, "disable_any_whitespace": True}  # a random model would write blanks for long
    for seed in range(4):
        answer = server.post(
            "/v1/chat/completions", messages=messages, structured_outputs=form, seed=seed, max_tokens=60
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] == 3  # <start>, Hello, <end>
        found = json.loads(answer.json()["choices"][0]["message"]["content"])
        assert found.keys() == {"kind", "old"} and found["kind"] in "ab" and isinstance(found["old"], bool)


def test_the_process_that_speaks_http_has_no_torch(server: RunningServer) -> None:
    server.get("/v1/models")
    assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{server.engine_pid}/maps").read_text()


def test_both_give_the_same_tokens(models: dict[str, Path]) -> None:
    given = []
    for path in models.values():
        with LLM(str(path), dtype="float32") as llm:
            (output,) = llm.generate("Hello, world", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
            given.append(output.token_ids)
    assert len(given[0]) == 20 and given[0] == given[1]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_commands_take_it(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    path = str(models[kind])
    (tmp_path / "text.txt").write_text("Hello, Hello world. " * 20)
    calibration = ["--calibration", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    said = {
        ("inspect", path): "dense, width 40",
        ("evaluate", path, "--text", str(tmp_path / "text.txt")): "nats/token",
        ("generate", "Hello", "--model", path, "--max-tokens", "3"): "Hello",
        ("bench", "engine", path, "--only", "profile", "--running", "1", "--steps", "2"): "kernels",
        ("prune", path, *calibration): "its FFN is dense; only dsc has atoms",
    }
    for arguments, words in said.items():
        result = CliRunner().invoke(main, arguments)
        assert words in result.output, (arguments, result.output)
        assert result.exit_code == (arguments[0] == "prune"), result.output


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_errors_name_what_was_given(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / models[kind].name
    if kind == "folder":
        path.mkdir()
        for name, own in content(models[kind]).items():
            (path / name.name).write_bytes(own)
    weights = path / "model.safetensors" if kind == "folder" else path
    whole = (models[kind] / "model.safetensors" if kind == "folder" else models[kind]).read_bytes()
    weights.write_bytes(whole[: len(whole) * 3 // 4])
    for command in ("inspect", "serve"):
        ran = subprocess.run(
            [sys.executable, "-m", "dsc_serve.cli", command, str(path)], capture_output=True, text=True
        )
        assert ran.returncode == 1 and not ran.stdout
        (line,) = ran.stderr.splitlines()
        assert str(weights) in line
