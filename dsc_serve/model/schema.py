"""What the typed parts of a `config.json` share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Far beyond any model, and far below what overflows or takes all memory before it is compared with the weights.
Size = Annotated[int, Field(ge=1, le=2**27)]
MOST_LAYERS = 2**12
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Parts = Annotated[int, Field(ge=1, le=2**14)]  # of a layer, each with tensors of its own


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
