"""The whole engine on Triton's operators: the reference script's own greedy ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import honest  # noqa: F401  sets the interpreter up before any kernel is defined
from support.small_models import DATA

from dsc_kernels import ops
from dsc_kernels.gpu import layers
from dsc_serve import LLM, SamplingParams
from dsc_serve.model.reference import import_reference


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    yield
    ops.use("auto")


@pytest.mark.parametrize(
    "method", ["dsc", *(pytest.param(m, marks=pytest.mark.full) for m in ("standard_moe", "dense"))]
)
def test_greedy_ids_match(method: str, tmp_path: Path) -> None:
    folder = tmp_path / method
    import_reference(DATA / f"{method}.weights.safetensors", DATA / f"{method}.config.json", folder)
    greedy = load_file(DATA / f"{method}.io.safetensors")["greedy_ids"]
    half, some = greedy.shape[1] // 2, 6
    with LLM(str(folder), dtype="float32", kernels="triton", threads=1) as llm:
        blocks = llm.engine.runner.model.layers  # type: ignore[attr-defined]
        assert all(isinstance(block.ffn.layer, layers.Ffn | layers.Moe) for block in blocks)
        assert ops.backend(torch.float32, torch.device("cpu")) is layers
        bank = addresses(blocks)
        outputs = llm.generate(greedy[:, :half].tolist(), SamplingParams(temperature=0, max_tokens=some))
        assert addresses(blocks) == bank, "the weights have moved while serving"
    assert [output.token_ids for output in outputs] == greedy[:, half : half + some].tolist()


def addresses(blocks: list) -> list[int]:
    tensors = [t for block in blocks for t in vars(block.ffn.layer).values() if isinstance(t, torch.Tensor)]
    return [tensor.data_ptr() for tensor in tensors]
