"""A checkpoint's weights in fewer bits, layer by layer, each on what the rounded ones before it make."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dsc_kernels import reference
from dsc_kernels.quantised import QuantisedWeight
from dsc_serve.model.checkpoint import forms_for, open_source, save_checkpoint
from dsc_serve.model.config import DscConfig, ModelConfig
from dsc_serve.model.ffn.dsc import within
from dsc_serve.model.folder import refuse_taken
from dsc_serve.model.origin import write_origin
from dsc_serve.model.placement import BITS, form_name
from dsc_serve.model.quantised_folder import Saved
from dsc_serve.model.quantised_tensor import QuantisedTensor
from dsc_serve.model.rounding import OutOfRangeError, rounded
from dsc_serve.model.source import ModelSource
from dsc_serve.train.quantise.compensation import compensated, norm_is_estimated, spectral_norm
from dsc_serve.train.quantise.feedback import rounded_with_feedback
from dsc_serve.train.quantise.walk import Products, Walk, plainly
from dsc_serve.weight_forms import Forms, KeepError, Part, part_of

WINDOW = 512  # tokens of a text that see each other
CALIBRATED = ("attention", "mlp", "experts")  # whose inputs are seen; other parts are rounded to nearest


@dataclass(frozen=True)
class RoundedMatrix:
    """What became of one matrix."""

    name: str
    form: str
    # of its outputs over the calibration's inputs, or of itself without one, in parts of what it was, by 2-norm
    error: float
    # ‖W − Ŵ‖₂, compensation and all: no input of length 1 is multiplied more wrongly. None where this and the norm say
    # little: for an embedding
    residual: float | None
    norm: float | None  # ‖W‖₂
    estimated: bool = False  # both are from below, and no bounds


class Conversion:
    """From a source to tensors to be saved. windows: the calibration's tokens, int64 [T] each; none: to nearest.

    rank: of the compensation of every matrix but the embedding's, head's, router's and bank's; 0: none.
    """

    def __init__(self, source: ModelSource, forms: Forms, windows: Sequence[Tensor] = (), rank: int = 0) -> None:
        self.source, self.forms, self.windows, self.rank = source, forms, windows, rank
        self.config = rounded_config(source.config, forms)
        if self._normed and forms["router"] in BITS:
            raise KeepError(
                f"keep gives router {forms['router']}, but routers of kind {source.config.ffn.kind} have a norm that "
                "only loading can fold in; leave router out here and give it to serve"
            )
        self.matrices: list[RoundedMatrix] = []
        self.tensors: dict[str, Saved] = {}

    def run(self, progress: bool = False) -> None:
        """Fill `tensors` and `matrices`. Raises CheckpointError."""
        with plainly():
            weights = self.source.weights()
            outer = [name for name in weights if not name.startswith("model.layers.")]
            for name in outer:
                self._take(name, weights[name], None)
            served = ChainMap({name: dequantised(self.tensors[name]) for name in outer}, weights)  # type: ignore[arg-type]
            before, after = (Walk(config, served) for config in (self.source.config, self.config))
            inputs = before.embedded(self.windows) if self.windows else []
            after.ropes = before.ropes
            for i in tqdm(range(self.config.num_hidden_layers), disable=not progress, unit="layer"):
                inputs = self._layer(i, before, after, inputs)

    def _layer(self, i: int, before: Walk, after: Walk, inputs: list[Tensor]) -> list[Tensor]:
        prefix = f"model.layers.{i}."
        read = {name: before.tensors[name] for name in self.source.tensors if name.startswith(prefix)}
        wide = {name: tensor.float() for name, tensor in read.items()}
        squares: dict[str, Tensor] = {}
        if inputs:
            layer = before.layer(i, wide)
            names = {wide[name].data_ptr(): name for name in wide if part_of(name) in CALIBRATED}
            qkv = layer.attention.qkv.weight  # type: ignore[attr-defined]
            with Products(names | {qkv.data_ptr(): f"{prefix}self_attn.q_proj.weight"}) as products:
                before.run(layer, inputs)
            squares = products.squares
            for part in "kv":
                squares[f"{prefix}self_attn.{part}_proj.weight"] = squares[f"{prefix}self_attn.q_proj.weight"]
        routed = self._folded(i, prefix, wide)
        for name, tensor in routed.items():
            self._take(name, read[name] if tensor is wide.get(name) else tensor, squares.get(name))
        if not inputs:
            return inputs
        return after.run(after.layer(i, {name: dequantised(self.tensors[name]) for name in routed}), inputs)

    def _folded(self, i: int, prefix: str, wide: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same, where they are rounded with the router's norm folded into it and the bank's rows projected."""
        found, c = dict(wide), self.config.layers[i].ffn
        if not isinstance(c, DscConfig):
            return found
        mlp = f"{prefix}mlp."
        if c.router_norm and self._bits("router"):
            parts = (f"{mlp}router.weight", f"{mlp}router_norm.weight", f"{mlp}router_norm.bias")
            weight, scale, shift = (wide[name].double() for name in parts)
            own = wide.get(f"{mlp}router.bias")
            folded, bias = reference.fold_router_norm(weight, None if own is None else own.double(), scale, shift)
            found |= zip(
                parts, (folded.float(), torch.ones_like(scale).float(), torch.zeros_like(shift).float()), strict=True
            )
            found[f"{mlp}router.bias"] = bias.float()
        before = self.source.config.ffn
        if isinstance(before, DscConfig) and before.atoms != c.atoms:
            for name in (f"{mlp}atoms_u", f"{mlp}atoms_v"):
                found[name] = reference.project(wide[name].double(), c.eps).float()
        return found

    def _bits(self, part: Part) -> int | None:
        return BITS.get(self.forms[part])

    def _take(self, name: str, tensor: Tensor, squares: Tensor | None) -> None:
        """Round a tensor where it is to be, and keep it."""
        part = part_of(name)
        own = None if part is None else self._rounded(name, part, tensor, squares)
        self.tensors[name] = self._floating(name, tensor) if own is None else own

    def _floating(self, name: str, tensor: Tensor) -> Tensor:
        """As it is stored: matrices that come in float32 only because they are read so, in the source's dtype.

        Routers, which families keep in float32 beside narrower weights, stay in theirs.
        """
        stored = self.source.tensors.get(name)
        if part_of(name) == "router" and stored is not None and stored.quantised is None:
            return tensor.to(stored.dtype)
        return tensor.to(self.source.dtype) if tensor.dim() > 1 else tensor

    def _rounded(self, name: str, part: Part, tensor: Tensor, squares: Tensor | None) -> QuantisedTensor | None:
        """None where it stays in floating point."""
        bits, stored = BITS.get(self.forms[part]), self.source.tensors.get(name)
        if stored is not None and stored.quantised is not None and self.forms[part] != "bfloat16":
            own = stored.quantised()
            if own is not None and (bits is None or own.bits <= bits):
                return own
        if bits is None:
            return None
        flat = tensor.float().flatten(0, -2)
        try:
            weight = rounded(flat, bits) if squares is None else rounded_with_feedback(flat, squares, bits)
        except OutOfRangeError:
            return None
        if part == "bank" and isinstance(self.config.ffn, DscConfig):
            bank = within(weight)
            assert isinstance(bank, QuantisedWeight)
            weight = bank
        if self.rank and part in CALIBRATED:
            weight = compensated(flat, weight, squares, self.rank)
        self._note(name, flat, weight, squares)
        left, right = weight.compensation or (None, None)
        whole = QuantisedTensor(
            weight.values, weight.scales, weight.minimums, bits, weight.group, tuple(flat.shape), left, right
        )
        if tensor.dim() == 2:
            return whole
        outer = tensor.shape[:-1]
        return replace(whole.mapped(lambda part: part.reshape(*outer, part.shape[-1])), shape=tuple(tensor.shape))

    @property
    def _normed(self) -> bool:
        """Whether routers have a norm that cannot be folded into what is stored: theirs have no bias of their own."""
        return getattr(self.config.ffn, "router_norm", self.config.ffn.kind == "molora") and not isinstance(
            self.config.ffn, DscConfig
        )

    def _note(self, name: str, wide: Tensor, weight: QuantisedWeight, squares: Tensor | None) -> None:
        residual = wide - weight.whole()
        if squares is None:
            error = float(residual.norm() / wide.norm().clamp_min(1e-30))
        else:
            lost, all_of = (float(((w @ squares) * w).sum()) for w in (residual, wide))
            error = math.sqrt(max(lost, 0.0) / max(all_of, 1e-30))
        small = wide.shape[0] <= 4 * wide.shape[1]  # an embedding's norm says little and takes long
        residual_norm, norm = (spectral_norm(w) for w in (residual, wide)) if small else (None, None)
        estimated = small and norm_is_estimated(wide)
        self.matrices.append(RoundedMatrix(name, form_name(weight), error, residual_norm, norm, estimated))

    def save(self, out: Path) -> None:
        """Write a checkpoint folder. Raises CheckpointError, TokenizerError."""
        texts = self.source.texts()
        save_checkpoint(self.config, self.tensors, out, self.source.path, self.source.dtype)
        if self.source.origin is not None:
            write_origin(self.source.origin, out)
        for name, text in texts.items():
            (out / name).write_text(text, "utf8")


def dequantised(saved: Saved) -> Tensor:
    return saved.dequantised() if isinstance(saved, QuantisedTensor) else saved


def rounded_config(config: ModelConfig, forms: Forms) -> ModelConfig:
    """The configuration of what is written: a DSC router takes its norm in and a bias for it, its bank is projected."""
    c = config.ffn
    if not isinstance(c, DscConfig):
        return config
    changes: dict[str, object] = {}
    if c.router_norm and forms["router"] in BITS:
        changes["router_bias"] = True
    if forms["bank"] in BITS:
        changes["atoms"] = "projected"
    return config.model_copy(update={"ffn": c.model_copy(update=changes)}) if changes else config


def spread(ids: Sequence[int], length: int, tokens: int) -> list[Tensor]:
    """Windows of `length` tokens, evenly spaced over a text, `tokens` of them together; a short text is one window."""

    def starts() -> Iterator[int]:
        count = max(1, min(tokens, len(ids)) // length)
        for i in range(count):
            yield i * max(0, len(ids) - length) // max(1, count - 1)

    return [torch.tensor(ids[start : start + length]) for start in starts()]


def convert(
    model: Path, out: Path, weights: str, keep: str, ids: Sequence[int], rank: int, tokens: int, progress: bool = False
) -> Conversion:
    """Write `model` to `out` in other forms. ids: the calibration's. Raises CheckpointError, KeepError."""
    refuse_taken(out)
    source = open_source(model)
    source.check()
    windows = spread(ids, min(WINDOW, source.config.max_position_embeddings), tokens) if ids else []
    conversion = Conversion(source, forms_for(source.config, weights, keep), windows, rank)
    conversion.run(progress)
    conversion.save(out)
    return conversion
