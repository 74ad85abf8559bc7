"""A model in words and figures, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from dsc_kernels import ops
from dsc_kernels.weights import MAX_PICKS
from dsc_serve.model.config import DenseConfig, DscConfig, ModelConfig, MoeConfig, MoloraConfig
from dsc_serve.model.decoder import Decoder, dsc_layers, parameter_counts


def describe(model: Decoder) -> dict[str, str]:
    """What the model is: rows of a name and a text."""
    c = model.config
    total, active = parameter_counts(c)
    head = "tied" if c.tie_word_embeddings else "untied"
    rows = {
        "architecture": f"{c.num_hidden_layers} layers, width {c.hidden_size}, {c.num_attention_heads} heads "
        f"({c.num_key_value_heads} of keys and values) of {c.head_dim}",
        "attention": attention(c),
        "vocabulary": f"{c.vocab_size}, {head} head",
        "context": f"{c.max_position_embeddings} tokens, {positions(c)}",
        "norm": norms(c),
        "mlp": f"{c.hidden_act}, {'gated' if c.mlp_gated else 'plain'}",
        "parameters": f"{total:,} in all, {active:,} active per token",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    f = c.ffn
    rows["weights"] = weights(model)
    rows["ffn"] = "; ".join(by_kind(c, ffn))
    if isinstance(f, DscConfig):
        layers = dsc_layers(model)
        size = sum(layer.bank_bytes for layer in layers)
        zero = sum(layer.zero_atoms for layer in layers)
        rows["bank"] = (
            f"U and V [{f.num_atoms}, {c.hidden_size}] per layer, {size / 1e6:.1f} MB in all, {zero} zero atoms"
        )
        bounds = ", ".join(f"{layer.certificate:.3g}" for layer in layers)
        screened = all(layer.layer.screened for layer in layers)
        rows["router"] = "screened in int8, certified" if screened else "exact"
        rows["certificate"] = f"max |γ| per layer, bounds the dynamic part's operator norm: {bounds}"
    rows["kernels"] = kernels(model)
    return rows


def weights(model: Decoder) -> str:
    """What the matrices are held in, and the bytes of each form."""
    forms = ", ".join(f"{size / 1e6:.1f} MB {form}" for form, size in model.held.most_common())
    return f"{sum(model.held.values()) / 1e6:.1f} MB: {forms}"


def by_kind(config: ModelConfig, told: Callable[[ModelConfig], str]) -> list[str]:
    """What is told of each kind of layers, with how many there are where the kinds differ in it."""
    counts = Counter(told(layer) for layer in config.layers)
    return list(counts) if len(counts) == 1 else [f"{text} ({count} layers)" for text, count in counts.items()]


def attention(config: ModelConfig) -> str:
    """What tokens see, by kind of layers, and what is kept of them."""
    kept = "" if config.latent_size is None else f", values are {config.latent_size} numbers of the key"
    cap = f", scores within ±{config.attention_cap:g}" if config.attention_cap else ""
    seen = by_kind(config, lambda layer: f"the last {layer.window} tokens" if layer.window else "all tokens before")
    return "; ".join(seen) + kept + cap


def positions(config: ModelConfig) -> str:
    """How positions enter, by kind of layers."""
    if config.position_embedding_type == "learned":
        return "learned positions"
    part = "" if config.rotary_dim is None else f" of {config.rotary_dim} of {config.head_dim} numbers of a head"
    return "; ".join(by_kind(config, lambda layer: f"rope positions{part}" if layer.rotation else "no positions"))


PLACES = {
    "before": "",
    "after": " after each branch",
    "parallel": ", branches beside each other",
    "shared": " that both branches share",
    "around": " before and after each branch",
}
QK = {
    "none": "",
    "head": "; of queries and keys per head",
    "all": "; of queries and keys over all heads",
    "latent": "; of what is latent in keys",
}


def norms(config: ModelConfig) -> str:
    return "; ".join(by_kind(config, lambda layer: config.norm_type + PLACES[layer.norms] + QK[layer.qk_norm]))


def ffn(config: ModelConfig) -> str:
    """The FFN of layers that are all alike."""
    f = config.ffn
    if isinstance(f, DenseConfig):
        return f"dense, width {f.size}"
    if isinstance(f, MoeConfig):
        shared = f", and one that all tokens share of width {f.shared_expert.size}" if f.shared_expert else ""
        return f"moe, {f.experts_per_token} of {f.num_experts} experts of width {f.expert_size}{shared}"
    if isinstance(f, MoloraConfig):
        picked = f"{f.adapters_per_token} of {f.num_adapters} adapters of rank {f.rank}"
        return f"molora, {picked}, static width {f.static_size}"
    algorithm = "1" if not f.router_norm and not f.router_bias and f.gamma == "scalar" else "2"
    picked = f"{f.atoms_per_token} of {f.num_atoms} atoms"
    return f"dsc (algorithm {algorithm}), {picked}, static width {f.static_size}"


def kernels(model: Decoder) -> str:
    """What computes the model here: a layer that is out of the kernels' range is served by plain torch."""
    text = ops.description(model.device)
    if text.startswith("plain") or all(layer.ffn.layer.backend != "plain" for layer in model.layers):
        return text
    return f"{text}, but plain torch for the FFN layers (more than {MAX_PICKS} picks per token)"
