"""How many launches a layer needs in a step: a graph's nodes, and what the host starts one by one without a graph."""

from __future__ import annotations

import os

import pytest
import torch
from support.launches import STEPS, WANTED, counting, decoder, of_a_layer

from dsc_kernels import ops
from dsc_serve.model.config import MoeConfig
from dsc_serve.model.initial import preset_config

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="there is a GPU, or no compiled kernel",
)

LLAMA = {
    "position_embedding_type": "rope",
    "norm_type": "rmsnorm",
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "mlp_gated": True,
}
FORMS = {"paper": {"position_embedding_type": "learned"}, "Llama": LLAMA}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", WANTED)
def test_launches_of_a_layer(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset_config("paper", kind, context=1024).model_copy(update=FORMS[form])  # type: ignore[arg-type]
    with counting(monkeypatch) as launches:
        found = of_a_layer(launches, decoder(config))
    ops.use("auto")
    gated = form == "Llama" and kind != "moe"  # a product and a multiplication more where cuBLAS computes the MLP
    wanted = [n + 2 * (gated and step.endswith("8 chunks")) for step, n in zip(STEPS, WANTED[kind], strict=True)]
    assert [sum(counts.values()) for counts in found.values()] == wanted, found
    assert all(counts["triton:attend_chunks"] == (name != "decode") for name, counts in found.items())


def test_many_experts_take_one_launch_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their router is a product of its own."""
    config = preset_config("paper", "moe", context=1024).model_copy(update=LLAMA)
    assert isinstance(config.ffn, MoeConfig)
    config = config.model_copy(update={"ffn": config.ffn.model_copy(update={"num_experts": 64, "expert_size": 32})})
    with counting(monkeypatch) as launches:
        found = of_a_layer(launches, decoder(config))
    assert sum(found["decode"].values()) == 11, found
