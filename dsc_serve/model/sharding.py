"""What each of several ranks computes of a model: the configuration of its part, and its slices of the tensors.

Attention is divided by heads, MLPs and experts by their width, banks by rows with those of their routers. Embedding,
head, norms and the routers of mixtures of experts are every rank's. What a tensor is cut by follows from its shapes in
the configurations of the parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dsc_kernels.quantised import Weight
from dsc_serve.model.config import CheckpointError, DscConfig, FfnConfig, ModelConfig, MoeConfig, MoloraConfig
from dsc_serve.model.exchange import Shard
from dsc_serve.model.tensor_shapes import tensor_shapes

SETTING = "tensor_parallel"
# By the kind of an FFN its fields that are divided.
DIVIDED = {
    "dsc": ("num_atoms", "static_size"),
    "molora": ("num_adapters", "static_size"),
    "moe": ("expert_size",),
    "dense": ("size",),
}
OUTPUT_BIASES = ("o_proj.bias", "down_proj.bias")  # added to what is summed over ranks, and so by the first alone


def rank_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The model as a rank computes it. Raises CheckpointError for what cannot be divided so."""
    if shard.size == 1:
        return config
    check_divisible(config, shard.size)
    each = config.num_attention_heads // config.num_key_value_heads  # queries of a head of keys stay with it
    kv_heads = len(shard.part(config.num_key_value_heads))
    kinds = [
        kind if kind.ffn is None else kind.model_copy(update={"ffn": rank_ffn(kind.ffn, shard)})
        for kind in config.layer_kinds
    ]
    own = {"num_attention_heads": kv_heads * each, "num_key_value_heads": kv_heads, "layer_kinds": kinds}
    return config.model_copy(update={**own, "ffn": rank_ffn(config.ffn, shard)})


def rank_ffn(ffn: FfnConfig, shard: Shard) -> FfnConfig:
    own: dict[str, object] = {name: len(shard.part(getattr(ffn, name))) for name in DIVIDED[ffn.kind]}
    if isinstance(ffn, MoeConfig) and ffn.shared_expert is not None:
        size = len(shard.part(ffn.shared_expert.size))
        own["shared_expert"] = ffn.shared_expert.model_copy(update={"size": size})
    return ffn.model_copy(update=own)


def check_divisible(config: ModelConfig, ranks: int) -> None:
    """Raises CheckpointError, with field and value, for what so many ranks cannot share."""
    shared = f"{SETTING} is {ranks}"
    if config.latent_size is not None:
        raise CheckpointError(f"latent_size is {config.latent_size}, one head of keys for all; {shared}, allowed: 1")
    sizes = {"num_key_value_heads": config.num_key_value_heads}
    for kind in config.kinds:
        if kind.qk_norm == "all":
            raise CheckpointError(f"qk_norm is 'all', over the heads of all ranks; {shared}, allowed: none, head")
        sizes |= {f"ffn.{name}": getattr(kind.ffn, name) for name in DIVIDED[kind.ffn.kind]}
        if isinstance(kind.ffn, MoeConfig) and kind.ffn.shared_expert is not None:
            sizes["ffn.shared_expert.size"] = kind.ffn.shared_expert.size
        check_picks(kind.ffn, ranks)
        for name, size in sizes.items():
            if size < ranks:
                raise CheckpointError(f"{name} is {size}; {shared}, and each rank must have one at least")


def check_picks(ffn: FfnConfig, ranks: int) -> None:
    """Each rank offers as many candidates as are picked in all. Raises CheckpointError where one has fewer rows."""
    if isinstance(ffn, DscConfig):
        field, picked, of, rows = "atoms_per_token", ffn.atoms_per_token, "num_atoms", ffn.num_atoms
    elif isinstance(ffn, MoloraConfig):
        field, picked, of, rows = "adapters_per_token", ffn.adapters_per_token, "num_adapters", ffn.num_adapters
    else:
        return
    if picked > rows // ranks:
        what = f"ffn.{field} is {picked}, ffn.{of} {rows}"
        raise CheckpointError(f"{what}; {SETTING} is {ranks}, and each rank must have as many as are picked")


def rank_tensors(config: ModelConfig, tensors: Mapping[str, Weight], shard: Shard) -> Mapping[str, Weight]:
    """A rank's slices of a model's tensors, under the same names; of the whole configuration."""
    return tensors if shard.size == 1 else RankTensors(config, tensors, shard)


class RankTensors(Mapping[str, Weight]):
    """A rank's slices: each tensor is read when its slice is asked for, and not kept."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], shard: Shard) -> None:
        self._tensors, self._shard = tensors, shard
        self._whole = tensor_shapes(config)
        before = [rank_config(config, Shard(rank, shard.size)) for rank in range(shard.rank + 1)]
        self._parts = [tensor_shapes(own) for own in before]  # of the ranks before this one, and its own

    def __getitem__(self, name: str) -> Tensor:
        """Raises CheckpointError for what is stored in few bits: a slice may cut its groups."""
        weight = self._tensors[name]
        if not isinstance(weight, Tensor):
            what = f"tensor {name} is quantised; {SETTING} is {self._shard.size}"
            raise CheckpointError(f"{what}, with which weights must be 'bfloat16', or be stored in floating point")
        if self._shard.rank and name.endswith(OUTPUT_BIASES):
            return torch.zeros_like(weight)
        *before, own = (shapes[name] for shapes in self._parts)
        for dim, (whole, length) in enumerate(zip(self._whole[name], own, strict=True)):
            if length != whole:
                first = sum(shape[dim] for shape in before)
                return weight.narrow(dim, first, length).clone(memory_format=torch.contiguous_format)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
