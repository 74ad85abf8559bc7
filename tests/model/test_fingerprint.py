"""A loaded model lives in memory of its own, and is told from every other by its fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_models import SMALL_FFN

from dsc_kernels import ops
from dsc_serve import LLM
from dsc_serve.model.config import CheckpointError
from dsc_serve.model.fingerprint import OTHER_FILES, Fingerprint

PROMPT = [[1, 2, 3, 5, 8, 13, 21]]


def overwrite(file: Path, damage: str) -> None:
    """In place: who has mapped the file sees it."""
    size = file.stat().st_size
    with file.open("r+b") as stream:
        if damage == "cut":
            stream.truncate(0)
        else:
            stream.write(bytes([0x3F]) * size)


@pytest.mark.parametrize("damage", ["overwritten", "cut"])
@pytest.mark.parametrize("kernels", ["plain", "auto"])
@pytest.mark.parametrize("kind", SMALL_FFN)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "position_embedding_type": "learned", "mlp_gated": True, "norm_type": "rmsnorm"},
    ],
    ids=["tied", "untied"],
)
def test_a_running_model_does_not_follow_its_files(
    small_model: Callable[..., Path], kind: str, kernels: str, damage: str, changes: dict[str, object]
) -> None:
    folder = small_model(kind, **changes)
    try:
        with LLM(str(folder), kernels=kernels) as llm:
            before = llm.logits(PROMPT)[0]
            assert str(folder) not in Path("/proc/self/maps").read_text()
            overwrite(folder / "model.safetensors", damage)
            assert torch.equal(llm.logits(PROMPT)[0], before)
    finally:
        ops.use("auto")


def test_the_same_model_has_the_same_fingerprint_and_any_other_another(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = small_model()
    (folder / "tokenizer.json").write_text("{}")
    found = Fingerprint(folder).take()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert Fingerprint(copy).take() == found
    (copy / "chat_template.jinja").write_text("the API process's own")
    assert Fingerprint(copy).take() == found

    others = {found}
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, copy / "model.safetensors")
    others.add(Fingerprint(copy).take())
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "norm_eps": 1e-3}))
    others.add(Fingerprint(copy).take())
    (copy / "tokenizer.json").write_text("{ }")
    others.add(Fingerprint(copy).take())
    (copy / "generation_config.json").unlink()
    others.add(Fingerprint(copy).take())
    assert len(others) == 5


@pytest.mark.parametrize("change", ["written", "replaced", "gone", "new"])
def test_files_that_change_while_they_are_loaded_are_named(small_model: Callable[..., Path], change: str) -> None:
    folder = small_model()
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    tokenizer.write_text("{}" if change == "gone" else "")
    if change == "new":
        tokenizer.unlink()
    seal = Fingerprint(folder)
    if change == "written":
        with weights.open("r+b") as file:
            file.write(weights.read_bytes()[:1])
    elif change == "replaced":
        shutil.copy2(weights, folder / "new")
        (folder / "new").rename(weights)
    elif change == "gone":
        tokenizer.unlink()
    else:
        tokenizer.write_text("{}")
    name = "tokenizer.json" if change in ("gone", "new") else "model.safetensors"
    with pytest.raises(CheckpointError, match=rf"{name}: changed while the model was being loaded"):
        seal.take()


@pytest.mark.parametrize("name", OTHER_FILES)
def test_each_file_that_decides_tokens_is_in_the_fingerprint(small_model: Callable[..., Path], name: str) -> None:
    folder = small_model()
    found = set()
    for content in (None, "{}", '{"a": 1}'):
        if content is not None and name != "config.json":
            (folder / name).write_text(content)
        elif content is not None:
            (folder / name).write_text((folder / name).read_text() + content[1:-1].replace('"a": 1', " ") + "\n")
        found.add(Fingerprint(folder).take())
    assert len(found) == 3
