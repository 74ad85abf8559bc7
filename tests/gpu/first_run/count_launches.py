"""How many launches a decoder layer needs, by kind: counted on a pretended GPU, so without one; prints a table."""

from __future__ import annotations

import pytest
import torch
from common import DRY, table
from internals import argmax_tokens, preset_config
from support.launches import BLOCK, STEPS, Launches, counting, decoder, of_a_layer
from support.pretended import DEVICE


@torch.inference_mode()
def row(launches: Launches, kind: str, positions: str) -> tuple[list[object], dict[str, int]]:
    config = preset_config("paper", kind, context=1024)
    heads = {"num_key_value_heads": 2} if positions == "rope" else {}
    model = decoder(config.model_copy(update={"position_embedding_type": positions, **heads}))
    found = of_a_layer(launches, model)
    hidden = torch.zeros(16, config.hidden_size, dtype=torch.bfloat16, device=DEVICE)
    head = launches.counted(lambda: argmax_tokens(model, hidden))
    return [positions, kind, *(sum(one.values()) for one in found.values()), sum(head.values())], dict(found["decode"])


def main() -> None:
    rows, decodes = [], []
    patch = pytest.MonkeyPatch()
    with counting(patch) as launches:
        for positions in ("learned",) if DRY else ("learned", "rope"):
            for kind in ("dsc", "moe", "molora", "dense"):
                cells, decode = row(launches, kind, positions)
                rows.append(cells)
                decodes.append((kind, decode))
    patch.undo()
    table(f"launches a layer ({BLOCK} tokens a block)", ["positions", "kind", *STEPS, "head and argmax"], rows)
    for kind, decode in decodes:
        print(kind, "decode:", decode)


main()
