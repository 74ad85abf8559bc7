"""What a `config.json` says of tensors that are stored in fewer bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dsc_serve.model.schema import Strict


class QuantisedTensors(Strict):
    """Tensors that are stored in groups of `group` numbers along their last dimension, of `bits` each.

    Instead of NAME a checkpoint then has NAME.values, NAME.scales, with `minimum` NAME.minimums and, with a rank,
    NAME.left and NAME.right; see `model/quantised_tensor.py`.
    """

    bits: Literal[4, 8]
    group: Literal[16, 32]
    minimum: bool
    rank: Annotated[int, Field(ge=0, le=2**16)] = 0
    tensors: Annotated[list[str], Field(min_length=1)]

    @property
    def parts(self) -> tuple[str, ...]:
        return ("values", "scales", *(("minimums",) * self.minimum), *(("left", "right") if self.rank else ()))
