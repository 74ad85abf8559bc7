"""The format number of checkpoints: old ones load for ever, newer ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_models import DATA

from dsc_serve import LLM
from dsc_serve.model.config import FORMAT, CheckpointError, load_config

WRITTEN = [
    *((1, kind) for kind in ("dsc", "moe", "molora", "dense")),
    *((2, "kinds"), (3, "windows"), (3, "latent")),
]


@pytest.mark.parametrize(("number", "kind"), WRITTEN)
def test_old_checkpoints_load_for_ever(number: int, kind: str) -> None:
    folder = DATA / "old" / str(number)
    with LLM(str(folder / kind), dtype="float32") as llm:
        found = llm.logits([list(range(20))])[0]
    torch.testing.assert_close(found, load_file(folder / "logits.safetensors")[kind], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("number", [FORMAT + 1, 0, "1", True, None])
def test_a_checkpoint_of_a_newer_version_is_refused_in_one_line(
    number: object, small_model: Callable[..., Path]
) -> None:
    path = small_model() / "config.json"
    content = json.loads(path.read_text())
    assert content["format"] == 1  # the lowest that holds it: older versions read it
    path.write_text(json.dumps({**content, "format": number, "a field of tomorrow": 1}))
    with pytest.raises(CheckpointError, match=rf"config\.json: format is {number!r}; this version reads 1 to {FORMAT}"):
        load_config(path.parent)
