"""`import-hf` writes of every family what reading the folder itself gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import CASES, family_folder
from torch import Tensor

from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.huggingface import import_huggingface
from dsc_serve.model.source import ModelSource


def weights(source: ModelSource) -> dict[str, Tensor]:
    source.check()
    return dict(source.weights())


def in_bfloat16(folder: Path) -> Path:
    """The same checkpoint with its weights stored in bfloat16."""
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", CASES)
def test_an_import_is_what_the_folder_gives(name: str, tmp_path: Path) -> None:
    folder = in_bfloat16(family_folder(name, tmp_path / "own"))
    config = import_huggingface(folder, tmp_path / "imported")
    there, here = open_source(folder), open_source(tmp_path / "imported")
    assert there.config == config
    assert here.config.model_copy(update={"eos_token_id": None}) == config.model_copy(update={"eos_token_id": None})
    assert here.config.eos_token_ids == config.eos_token_ids
    assert here.dtype == there.dtype == torch.bfloat16
    found, want = weights(here), weights(there)
    assert found.keys() == want.keys()
    for key, tensor in want.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", ["granite", "granite tied with biases", "granitemoe"])
def test_numbers_folded_into_weights_round_nothing(name: str, tmp_path: Path) -> None:
    """A product with a number that is no power of two has more digits than bfloat16: it is kept in float32."""
    source = open_source(in_bfloat16(family_folder(name, tmp_path / "m")))
    own = load_file(tmp_path / "m/model.safetensors")["model.embed_tokens.weight"]
    found = weights(source)
    assert torch.equal(found["model.embed_tokens.weight"], own.float() * CASES[name].config["embedding_multiplier"])
    assert {tensor.dtype for key, tensor in found.items() if "down_proj.w" in key} == {torch.float32}
    assert {tensor.dtype for key, tensor in found.items() if "up_proj.w" in key} == {torch.bfloat16}


def test_a_part_of_a_tensor_is_read_with_the_whole_but_once(tmp_path: Path) -> None:
    """64 experts in one tensor are not 64 readings of it."""
    from dsc_serve.model.architectures.tensors import Whole
    from dsc_serve.model.source import Stored

    readings = []

    def read() -> Tensor:
        readings.append(1)
        return torch.arange(12.0).view(6, 2)

    whole = Whole(Stored((6, 2), torch.float32, read))
    parts = [whole.part((2, 2), lambda t, i=i: t[2 * i : 2 * i + 2]) for i in range(3)]
    first = [part.read() for part in parts]
    assert len(readings) == 1 and torch.equal(torch.cat(first), torch.arange(12.0).view(6, 2))
    assert torch.equal(parts[1].read(), first[1]) and len(readings) == 2
    first[0].zero_()
    assert torch.equal(parts[0].read(), torch.arange(4.0).view(2, 2))  # no view of what is kept
