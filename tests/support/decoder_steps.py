"""Small decoders, and steps of prompts and single tokens for them."""

from __future__ import annotations

from typing import Any

import torch

from dsc_kernels import ops
from dsc_serve.model.batch import Chunk, StepBatch
from dsc_serve.model.decoder import Decoder
from support.small_models import small_config, wide_tensors

CPU, BLOCK, PAGES = torch.device("cpu"), 4, 40
LLAMA = {
    "norm_type": "rmsnorm",
    "position_embedding_type": "rope",
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "mlp_gated": True,
}
FORMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "Llama": LLAMA,
    "windows": {**LLAMA, "window": 6, "attention_cap": 3.0},
    "norms of heads": {**LLAMA, "qk_norm": "head"},
    "half turned": {**LLAMA, "rotary_dim": 8, "attention_bias": True},
    "biases": {"ffn": {"bias": True}, "attention_bias": True},
    "norms after": {**LLAMA, "norms": "after"},
    "many experts": {
        **LLAMA,
        "ffn": {"num_experts": 20, "experts_per_token": 4, "shared_expert": {"size": 24, "gated": True}},
    },
}


def decoder(kernels: str, kind: str, form: str, device: torch.device = CPU) -> Decoder:
    ops.use(kernels)
    config = small_config(kind, **FORMS[form])
    return Decoder(config, wide_tensors(config), torch.float32, device)


def steps(device: torch.device = CPU, lengths: tuple[int, int, int] = (5, 9, 7)) -> list[StepBatch]:
    """Two prompts; one more beside their next tokens; then three next tokens. lengths: of the prompts."""
    first, second, third = lengths
    g = torch.Generator().manual_seed(0)
    tables = torch.randperm(PAGES, generator=g)[:36].view(1, 3, 12)

    def step(work: list[tuple[int, int, int]]) -> StepBatch:
        """Of rows, how many tokens after how many."""
        rows = torch.tensor([row for row, _, _ in work])
        positions = torch.cat([torch.arange(before, before + count) for _, count, before in work])
        owners = torch.cat([torch.full((count,), row) for row, count, _ in work])
        blocks = tables[0, owners, positions // BLOCK][None]
        singles = sum(count == 1 for _, count, _ in work)
        contexts = torch.tensor([count + before for _, count, before in work])
        chunks, start = [], singles
        for at, (_, count, before) in enumerate(work):
            if count > 1:
                chunks.append(Chunk(at, start, count, count + before))
                start += count
        ids = torch.randint(61, (len(positions),), generator=g)
        decode_context = int(contexts[:singles].max()) if singles else 0
        inputs = (ids, positions, blocks, positions % BLOCK, tables[:, rows], contexts)
        return StepBatch(*(part.to(device) for part in inputs), singles, decode_context, tuple(chunks))

    return [
        step([(0, first, 0), (1, second, 0)]),
        step([(0, 1, first), (1, 1, second), (2, third, 0)]),
        step([(0, 1, first + 1), (1, 1, second + 1), (2, 1, third)]),
    ]
