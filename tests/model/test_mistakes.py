"""What people take for a model and is none, or none that is read: told in one line that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.foreign import huggingface_folder
from test_import_huggingface import expected_tensors

from dsc_serve import LLM
from dsc_serve.model.config import CheckpointError
from dsc_serve.model.huggingface import import_huggingface
from dsc_serve.text.tokenizer import TokenizerError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def only_bin(folder: Path) -> Path:
    huggingface_folder(folder, expected_tensors())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def pointers(name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        huggingface_folder(folder, expected_tensors())
        (folder / name).write_text(POINTER)
        return folder

    return build


def pointer_file(folder: Path) -> Path:
    folder.mkdir()
    (folder / "m.gguf").write_text(POINTER)
    return folder / "m.gguf"


def weights(folder: Path) -> Path:
    return huggingface_folder(folder, expected_tensors()) / "model.safetensors"


def ggufs(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a-q4.gguf").write_bytes(b"")
    return folder


def quantised(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: huggingface_folder(folder, expected_tensors(), **changes)


def beside(folder: Path) -> Path:
    huggingface_folder(folder, expected_tensors())
    (folder / "quantize_config.json").write_text("{}")
    return folder


def eight_bits(folder: Path) -> Path:
    tensors = expected_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    return huggingface_folder(folder, {**tensors, name: tensors[name].to(torch.float8_e4m3fn)})


def nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


MISTAKES: list[tuple[Callable[[Path], Path], str]] = [
    (adapter, "m: an adapter (adapter_config.json) of the model 'some/base', not a model; serve that with --adapters"),
    (
        only_bin,
        "m/model.safetensors: no such file; the folder holds pytorch_model.bin, and what is read",
    ),
    (pointers("config.json"), "m/config.json: a Git LFS pointer, not the file itself; git lfs pull fetches it"),
    (pointers("model.safetensors"), "m/model.safetensors: a Git LFS pointer, not the file itself"),
    (pointers("tokenizer.json"), "m/tokenizer.json: a Git LFS pointer, not the file itself"),
    (pointer_file, "m/m.gguf: a Git LFS pointer, not the file itself"),
    (
        weights,
        "m/model.safetensors: not a readable GGUF file: it does not begin with GGUF; of a .safetensors file, name",
    ),
    (ggufs, "m: a folder of GGUF files; name the file, such as"),
    (
        quantised(quantization_config={"quant_method": "gptq"}),
        "weights are quantised with gptq (quantization_config); ",
    ),
    (
        quantised(quantization={"bits": 4, "mode": "affine"}),
        "weights are quantised with affine (quantization); s",
    ),
    (beside, "m/quantize_config.json: the weights are quantised, as this file says; supported: float32"),
    (eight_bits, "m: tensor model.layers.0.mlp.up_proj.weight is stored as float8_e4m3fn, expected float32"),
    (quantised(rope_scaling={"rope_type": []}), "m/config.json: rope_scaling.rope_type is []; supported: default"),
    (nothing, "m/config.json: no such file"),
]


@pytest.mark.parametrize(("build", "message"), MISTAKES)
def test_a_mistake_is_told_in_one_line(build: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    path = build(tmp_path / "m")
    with pytest.raises((CheckpointError, TokenizerError)) as error:
        LLM(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 60}, {"num_hidden_layers": 3}, {"intermediate_size": None}, {"num_hidden_layers": 1}],
    ids=str,
)
def test_an_import_names_what_it_was_given(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = huggingface_folder(tmp_path / "given", expected_tensors(), **changes)
    with pytest.raises(CheckpointError) as error:
        import_huggingface(folder, tmp_path / "out")
    assert str(tmp_path / "given") in str(error.value) and "out" not in str(error.value)
    assert not (tmp_path / "out").exists()
