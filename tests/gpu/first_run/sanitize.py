"""Every kernel once, at odd sizes, for compute-sanitizer (memcheck, racecheck)."""

from __future__ import annotations

import torch
from common import DEVICE, DRY, say, sync
from internals import decode_attention, make_dsc, make_moe

SHAPES = [(67, 101, 5, 3), (384, 1523, 4, 70), (2056, 70, 3, 2)]  # d, atoms, k, batch
SEQUENCES = [(2, 3, 20, [1, 33, 70 if DRY else 700]), (1, 1, 64, [600, 17])]  # KV heads, group, head size, contexts


def feed_forward(dtype: torch.dtype, d: int, atoms: int, k: int, batch: int) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    x, weight, up, down = random(batch, d), random(atoms, d), random(40, d), random(d, 40)
    layer = make_dsc(up, down, weight, random(atoms, d), random(atoms, d), k)
    layer(x, x)
    layer.routed(x)
    make_moe(weight, up, down, 5, 2)(x, x)


def attend(dtype: torch.dtype, kv: int, group: int, size: int, contexts: list[int]) -> None:
    keys, values = (torch.randn(200, kv, 16, size, device=DEVICE).to(dtype) for _ in range(2))
    tables = torch.randint(200, (len(contexts), 48), device=DEVICE)
    query = torch.randn(len(contexts), kv * group, size, device=DEVICE).to(dtype)
    decode_attention(query, keys, values, tables, torch.tensor(contexts, device=DEVICE), 768, 0.1)


torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float32):
    for shape in SHAPES[:1] if DRY else SHAPES:
        feed_forward(dtype, *shape)
    for sequences in SEQUENCES[:1] if DRY else SEQUENCES:
        attend(dtype, *sequences)
sync()
say("sanitize: all ran")
