"""A trained model in the serving form."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsc_serve.model.checkpoint import save_checkpoint
from dsc_serve.model.config import ModelConfig
from dsc_serve.text.tokenizer import FILES


def export_model(
    config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, tokenizer: Path, out: Path
) -> None:
    """Write a checkpoint folder with the tokenizer of another folder, in place of one that is there already."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    save_checkpoint(config, {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}, part)
    for name in FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, part / name)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
