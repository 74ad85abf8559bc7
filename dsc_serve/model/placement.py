"""Weights as they are stored become those that layers compute with: on their device, in their dtype or fewer bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.dequantised import dense
from dsc_kernels.memory import resident
from dsc_kernels.quantised import ActivationBits, Bits, QuantisedWeight, Weight
from dsc_serve.model.exchange import ALONE, RankExchange
from dsc_serve.model.quantised_tensor import alike, as_tensor, widened
from dsc_serve.model.rounding import OutOfRangeError, rounded
from dsc_serve.weight_forms import AS_STORED, EIGHT_AT_LEAST, Form, Forms, Part

Mend = Callable[[QuantisedWeight], QuantisedWeight]
BITS: dict[Form, Bits] = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Placement:
    """How and where the weights of a model are held."""

    dtype: torch.dtype  # what layers compute in
    device: torch.device
    # Of the parts of the model; int8 is of at most 8 bits, int4 of at most 4
    forms: Forms = field(default_factory=lambda: AS_STORED)
    activation_bits: ActivationBits = 16  # of inputs of products with quantised weights
    exchange: RankExchange = ALONE  # with the ranks that share the model
    held: Counter[str] = field(default_factory=Counter)  # bytes of weights by their form, as they were placed

    def tensor(self, stored: Weight, dtype: torch.dtype | None = None) -> Tensor:
        """What is no weight of a product, in the layers' dtype or another one."""
        return as_tensor(stored, dtype or self.dtype).to(device=self.device)

    def weight(self, part: Part, stored: Weight, dtype: torch.dtype | None = None) -> Weight:
        """A weight [out, in] of a part; dtype: of what stays in floating point, where it is not the layers'."""
        return self._held(part, self._placed(part, stored, dtype))

    def weights(self, part: Part, stored: list[Weight], mended: Mend = lambda own: own) -> list[Weight]:
        """The same of several that must be of one form, such as those of a mixture's experts.

        mended: what quantised ones are served as.
        """
        placed = [self._placed(part, one, None) for one in stored]
        quantised = [one for one in placed if isinstance(one, QuantisedWeight)]
        if len(quantised) < len(placed):
            return [self._held(part, as_tensor(one, self.dtype)) for one in placed]
        return [self._held(part, mended(one)) for one in alike(quantised)]

    def _placed(self, part: Part, stored: Weight, dtype: torch.dtype | None) -> Weight:
        """In the form that the part has, on the host."""
        bits = BITS.get(self.forms[part])
        if isinstance(stored, QuantisedWeight):
            if self.forms[part] == "stored" or (bits is not None and stored.bits <= bits):
                own = widened(stored, 8, stored.group) if part in EIGHT_AT_LEAST else stored
                return self._served(own)
            stored = stored.whole()
        if bits is not None:
            try:
                return self._served(rounded(stored.float(), bits, self.dtype))
            except OutOfRangeError:  # numbers of millions, which only floating point holds
                pass
        return as_tensor(stored, dtype or self.dtype)

    def _served(self, own: QuantisedWeight) -> QuantisedWeight:
        return replace(own, dtype=self.dtype, activation_bits=self.activation_bits)

    def _held(self, part: Part, placed: Weight) -> Weight:
        """On the device, and counted: where no kernel there reads a part's levels, as the numbers they stand for."""
        if part in ops.backend(self.dtype, self.device).dequantises and isinstance(placed, QuantisedWeight):
            placed = dense(placed, self.dtype)
        if isinstance(placed, QuantisedWeight):
            there: Weight = placed.map(lambda tensor: tensor.to(self.device))
        else:
            there = placed.to(device=self.device)
        self.held[form_name(there)] += there.nbytes
        return there


def in_place(weight: Weight) -> Weight:
    """In memory that rows are picked from."""
    return weight.map(resident) if isinstance(weight, QuantisedWeight) else resident(weight)


def form_name(weight: Weight) -> str:
    """What a weight is held in, for people."""
    if not isinstance(weight, QuantisedWeight):
        return str(weight.dtype).removeprefix("torch.")
    form: Literal["int8", "int4"] = "int8" if weight.bits == 8 else "int4"
    rank = f", compensated with rank {weight.rank}" if weight.rank else ""
    return f"{form} in groups of {weight.group}{rank}"
