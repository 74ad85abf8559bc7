"""How many launches a layer needs in a step: a graph's nodes, and what the host starts one by one without a graph."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support.launches import STEPS, WANTED, counting, decoder, of_a_layer

from dsc_kernels import native, ops
from dsc_serve.model.config import MoeConfig, SharedExpertConfig
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
WIDE = {"vocab_size": 100, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
FORMS = {"paper": {"position_embedding_type": "learned"}, "Llama": LLAMA}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["dsc", "molora", "dense", "moe"])
def test_launches_of_a_layer(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset_config("paper", kind, context=1024).model_copy(update=FORMS[form])  # type: ignore[arg-type]
    with counting(monkeypatch) as launches:
        found = of_a_layer(launches, decoder(config))
    ops.use("auto")
    gated = form == "Llama" and kind != "moe"  # a product and a multiplication more where cuBLAS computes the MLP
    wanted = [n + 2 * (gated and step.endswith("8 chunks")) for step, n in zip(STEPS, WANTED[kind], strict=True)]
    assert [sum(counts.values()) for counts in found.values()] == wanted, found
    assert all(counts["triton:attend_chunks"] == (name != "decode") for name, counts in found.items())


def test_a_screened_router_takes_a_launch_more_in_steps_of_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset_config("paper", "dsc", context=1024)
    native.use_router("int8-certified")
    with counting(monkeypatch) as launches:
        found = of_a_layer(launches, decoder(config))
    ops.use("auto")
    native.use_router("auto")
    wanted = dict(zip(STEPS, WANTED["dsc"], strict=True))
    wanted["decode"] += 1
    assert {name: sum(counts.values()) for name, counts in found.items()} == wanted, found
    assert {name: counts["triton:rescore_rows"] for name, counts in found.items()} == {
        **dict.fromkeys(STEPS, 0),
        "decode": 1,
    }


MANY = WANTED["many experts"]
SORTED = (9, 9, 11, 13)  # of 64 tokens and so many experts a sort takes less time than what tiles would read
REAL_MIXTURES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "8 experts, 2 picked": ({"num_experts": 8, "experts_per_token": 2}, WANTED["moe"]),
    "16 experts, 4 picked": ({"num_experts": 16, "experts_per_token": 4}, WANTED["moe"]),
    "32 experts, 8 picked": ({"num_experts": 32, "experts_per_token": 8}, MANY),
    "64 experts, 8 picked": ({"num_experts": 64, "experts_per_token": 8}, SORTED),
    "128 experts, 8 picked": ({"num_experts": 128, "experts_per_token": 8, "normalize_weights": True}, SORTED),
    "64 experts, 6 picked, one shared": (
        {"num_experts": 64, "experts_per_token": 6, "shared_expert": SharedExpertConfig(size=64, gated=False)},
        (9, 8, 17, 19),
    ),
    "60 experts, 4 picked, one shared with a gate": (
        {"num_experts": 60, "experts_per_token": 4, "shared_expert": SharedExpertConfig(size=128, gated=True)},
        (9, 8, 21, 23),
    ),
}


@pytest.mark.parametrize("mixture", REAL_MIXTURES)
def test_launches_of_a_real_mixture(mixture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the widths of those that people run but for the experts': launches hang on how many there are."""
    fields, wanted = REAL_MIXTURES[mixture]
    config = preset_config("paper", "moe", context=1024).model_copy(update={**LLAMA, **WIDE})
    ffn = MoeConfig(**{**fields, "expert_size": 32, "router_norm": False})
    with counting(monkeypatch) as launches:
        found = of_a_layer(launches, decoder(config.model_copy(update={"ffn": ffn})))
    ops.use("auto")
    assert [sum(counts.values()) for counts in found.values()] == list(wanted), found
    assert found["decode"]["triton:multiply_experts"] == 2 and not found["decode"]["triton:place_slots"]
