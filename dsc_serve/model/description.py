"""A model in words and figures, for people."""

from __future__ import annotations

from dsc_kernels import ops
from dsc_kernels.weights import MAX_PICKS
from dsc_serve.model.config import DenseConfig, DscConfig, MoeConfig, MoloraConfig
from dsc_serve.model.decoder import Decoder, dsc_layers, parameter_counts


def describe(model: Decoder) -> dict[str, str]:
    """What the model is: rows of a name and a text."""
    c = model.config
    total, active = parameter_counts(c)
    head = "tied" if c.tie_word_embeddings else "untied"
    rows = {
        "architecture": f"{c.num_hidden_layers} layers, width {c.hidden_size}, {c.num_attention_heads} heads "
        f"({c.num_key_value_heads} of keys and values) of {c.head_dim}",
        "vocabulary": f"{c.vocab_size}, {head} head",
        "context": f"{c.max_position_embeddings} tokens, {c.position_embedding_type} positions",
        "norm": c.norm_type,
        "mlp": f"{c.hidden_act}, {'gated' if c.mlp_gated else 'plain'}",
        "parameters": f"{total:,} in all, {active:,} active per token",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    f = c.ffn
    if isinstance(f, DenseConfig):
        rows["ffn"] = f"dense, width {f.size}"
    elif isinstance(f, MoeConfig):
        rows["ffn"] = f"moe, {f.experts_per_token} of {f.num_experts} experts of width {f.expert_size}"
    elif isinstance(f, MoloraConfig):
        rows["ffn"] = f"molora, {f.adapters_per_token} of {f.num_adapters} adapters of rank {f.rank}, "
        rows["ffn"] += f"static width {f.static_size}"
    elif isinstance(f, DscConfig):
        algorithm = "1" if not f.router_norm and not f.router_bias and f.gamma == "scalar" else "2"
        rows["ffn"] = f"dsc (algorithm {algorithm}), {f.atoms_per_token} of {f.num_atoms} atoms, "
        rows["ffn"] += f"static width {f.static_size}"
        layers = dsc_layers(model)
        size = sum(layer.bank_bytes for layer in layers)
        zero = sum(int((layer.u.abs().amax(1) * layer.v.abs().amax(1) == 0).sum()) for layer in layers)
        rows["bank"] = (
            f"U and V [{f.num_atoms}, {c.hidden_size}] per layer, {size / 1e6:.1f} MB in all, {zero} zero atoms"
        )
        bounds = ", ".join(f"{layer.certificate:.3g}" for layer in layers)
        screened = all(layer.layer.screened for layer in layers)
        rows["router"] = "screened in int8, certified" if screened else "exact"
        rows["certificate"] = f"max |γ| per layer, bounds the dynamic part's operator norm: {bounds}"
    rows["kernels"] = kernels(model)
    return rows


def kernels(model: Decoder) -> str:
    """What computes the model here: a layer that is out of the kernels' range is served by plain torch."""
    text = ops.description(model.device)
    if text.startswith("plain") or all(layer.ffn.layer.backend != "plain" for layer in model.layers):
        return text
    return f"{text}, but plain torch for the FFN layers (more than {MAX_PICKS} picks per token)"
