"""The architecture of a model: a checkpoint's `config.json`, with Hugging Face's field names where one exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dsc_serve.model.rope import DivisorsRope, RopeScaling
from dsc_serve.model.schema import Size, Strict

IGNORED = {
    "architectures",
    "pad_token_id",
    "transformers_version",
    "use_cache",
    "torch_dtype",
    "dtype",
    "initializer_range",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; one line that names the file, the field or tensor, and what is expected."""


class DscConfig(Strict):
    """Dynamic Subspace Composition: a static MLP plus, per token, K of M rank-1 atoms.

    Algorithm 2 of the paper (and its reference script) has router_norm, router_bias and a γ per channel; Algorithm 1
    has no norm, no bias and a scalar γ. atoms says whether the file holds raw rows or rows already projected to
    norm ≤ 1.
    """

    kind: Literal["dsc"] = "dsc"
    num_atoms: Size
    atoms_per_token: Size
    static_size: Size
    tau: Annotated[float, Field(gt=0)] = 20.0
    eps: Annotated[float, Field(gt=0)] = 1e-6
    router_norm: bool = True
    router_bias: bool = True
    gamma: Literal["vector", "scalar"] = "vector"
    atoms: Literal["raw", "projected"] = "raw"

    @model_validator(mode="after")
    def _enough_atoms(self) -> DscConfig:
        if self.atoms_per_token > self.num_atoms:
            raise ValueError(f"atoms_per_token is {self.atoms_per_token}, more than num_atoms, {self.num_atoms}")
        return self


class MoeConfig(Strict):
    """Mixture of experts: each token runs through the k experts of the largest probability."""

    kind: Literal["moe"] = "moe"
    num_experts: Size
    experts_per_token: Size
    expert_size: Size
    router_norm: bool = True
    normalize_weights: bool = False

    @model_validator(mode="after")
    def _enough_experts(self) -> MoeConfig:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, more than num_experts, {self.num_experts}"
            )
        return self


class MoloraConfig(Strict):
    """Mixture of LoRAs: a static MLP plus, per token, k of N low-rank adapters weighted by a softmax over the k."""

    kind: Literal["molora"] = "molora"
    num_adapters: Size
    adapters_per_token: Size
    rank: Size
    static_size: Size

    @model_validator(mode="after")
    def _enough_adapters(self) -> MoloraConfig:
        if self.adapters_per_token > self.num_adapters:
            raise ValueError(
                f"adapters_per_token is {self.adapters_per_token}, more than num_adapters, {self.num_adapters}"
            )
        return self


class DenseConfig(Strict):
    """A plain MLP, with a bias in each of its products if `bias`."""

    kind: Literal["dense"] = "dense"
    size: Size
    bias: bool = False


FfnConfig = Annotated[DscConfig | MoeConfig | MoloraConfig | DenseConfig, Field(discriminator="kind")]


class ModelConfig(Strict):
    """One decoder: pre-norm layers of attention and an FFN of the configured kind.

    attention_bias: of the projections to q, k and v; attention_output_bias: of the one after attention.
    """

    model_type: Literal["dsc"] = "dsc"
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Annotated[int, Field(ge=16)]
    max_position_embeddings: Size
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    position_embedding_type: Literal["learned", "rope"] = "rope"
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    hidden_act: Literal["gelu", "silu"] = "gelu"
    mlp_gated: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    ffn: FfnConfig

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which num_key_value_heads, "
                f"{self.num_key_value_heads}, does not divide"
            )
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for token in ids:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} is {token}; allowed: 0 to {self.vocab_size - 1}")
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rope needs an even one")
        scaling = self.rope_scaling
        if scaling is not None and self.position_embedding_type != "rope":
            raise ValueError("rope_scaling is given, but position_embedding_type is 'learned'")
        if isinstance(scaling, DivisorsRope) and 2 * len(scaling.divisors) != self.head_dim:
            raise ValueError(
                f"rope_scaling.divisors has {len(scaling.divisors)} numbers; expected half of head_dim, {self.head_dim}"
            )
        return self

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError in one line."""
    try:
        content = json.loads(path.read_text("utf8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a JSON object")
    return content


def one_line(error: ValidationError) -> str:
    """A pydantic error as one line: field, what is wrong, the value."""
    parts = []
    for item in error.errors():
        # pydantic puts the kind of an FFN or of a scaling into the path
        tags = {"dsc", "moe", "molora", "dense", "linear", "llama3", "yarn", "divisors"}
        where = ".".join(str(p) for p in item["loc"] if p not in tags) or "config"
        value = item.get("input")
        shown = "" if isinstance(value, dict) or item["type"] == "missing" else f" (got {value!r})"
        parts.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{shown}")
    return "; ".join(parts)


def load_config(folder: Path) -> ModelConfig:
    """Read and check `config.json`. Raises CheckpointError naming every field that is wrong."""
    path = folder / "config.json"
    content = {k: v for k, v in read_json(path).items() if k not in IGNORED}
    form = content.get("model_type", "dsc")
    if form != "dsc":
        way = "dsc-serve import-hf FOLDER --out DIR makes one of a Llama, Mistral or Qwen2 checkpoint"
        raise CheckpointError(f"{path}: model_type is {form!r}; this server's own form is 'dsc', and {way}")
    eos = generation_eos(folder / "generation_config.json")
    if eos is not None:
        content["eos_token_id"] = eos
    heads = content.get("num_attention_heads")
    if isinstance(heads, int) and heads > 0:
        content.setdefault("num_key_value_heads", heads)
        if isinstance(content.get("hidden_size"), int):
            content.setdefault("head_dim", content["hidden_size"] // heads)
    return checked_config(content, str(path))


def checked_config(content: dict[str, Any], source: str) -> ModelConfig:
    """The fields of a configuration as they stand in JSON, checked. Raises CheckpointError naming `source`."""
    if isinstance(content.get("eos_token_id"), list):
        content = {**content, "eos_token_id": tuple(content["eos_token_id"])}
    try:
        return ModelConfig.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{source}: {one_line(error)}") from None


def generation_eos(path: Path) -> list[int] | None:
    """The end-of-text tokens of `generation_config.json`, which go before those of `config.json`, as in transformers.

    Its sampling defaults are left alone: an API's defaults do not change with the model.
    """
    if not path.exists():
        return None
    eos = read_json(path).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{path}: eos_token_id is {eos!r}, expected a token id or a list of them")
    return ids or None


def save_config(config: ModelConfig, folder: Path, dtype: str) -> None:
    """Write `config.json` and `generation_config.json`; dtype is that of the stored tensors."""
    content = {"architectures": ["DscForCausalLM"], **config.model_dump(exclude_none=True), "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", "utf8")
    tokens = {name: content[name] for name in ("bos_token_id", "eos_token_id") if name in content}
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n", "utf8")
