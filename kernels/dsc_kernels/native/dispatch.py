"""Which of the C++ kernels serve in this process: the instruction set, and whether routers are screened in int8."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from dsc_kernels.native.extension import kernels
from dsc_kernels.native.screen import MAX_WIDTH
from dsc_kernels.native.tensors import IS_BF16
from dsc_kernels.quantised import Weight

RouterPrecision = Literal["auto", "exact", "int8-certified"]
ROUTER_PRECISIONS: tuple[RouterPrecision, ...] = get_args(RouterPrecision)
SCREENED_ATOMS = 128  # for each that is picked, from which on it is faster
WIDENING_SETS = ("avx2", "avx512", "avx512bf16", "amx")  # that make float32 of bfloat16 in registers
SCREENING_SETS = ("avx512bf16", "amx")  # whose int8 products are faster than the others

_active: str | None = None
_router: RouterPrecision = "auto"


def available() -> list[str]:
    """Instruction sets that this machine has kernels for, best first."""
    return list(kernels.supported())


def active() -> str | None:
    """The instruction set in use; None when plain torch serves."""
    return _active


def use(name: str) -> None:
    """Serve with an instruction set of `available()`, with the best of them ("auto"), or not at all ("plain").

    A setting of the whole process: layers that exist compute with the new instruction set from now on, and "plain"
    keeps new layers, and what has no layer (attention, sampling), from using native kernels.
    Raises ValueError for a name that is not available, naming those that are.
    """
    global _active
    names = available()
    if name == "auto":
        name = names[0] if names else "plain"
    if name == "plain":
        _active = None
        return
    if name not in names:
        raise ValueError(f"kernels {name!r} are not available here; allowed: auto, plain, {', '.join(names)}")
    kernels.use(name)
    _active = name


def use_router(precision: RouterPrecision) -> None:
    """Score with the router as it is ("exact"), or screen it in int8 first ("int8-certified"); both pick the same.

    "auto" screens where that is faster. A setting of the whole process, for DSC layers made from now on.
    """
    global _router
    if precision not in ROUTER_PRECISIONS:
        raise ValueError(f"router_precision {precision!r} is not known; allowed: {', '.join(ROUTER_PRECISIONS)}")
    _router = precision


def router_precision() -> RouterPrecision:
    """The setting in use, for `use_router` to take again."""
    return _router


def screens(router: Weight, k: int) -> bool:
    """Whether a DSC layer with this router [atoms, d] screens it in int8."""
    if _router == "auto":
        return _active in SCREENING_SETS and router.shape[0] >= SCREENED_ATOMS * k and router.shape[1] <= MAX_WIDTH
    return _router == "int8-certified"


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether native kernels are in use for tensors of this kind."""
    return _active is not None and device.type == "cpu" and dtype in IS_BF16


def threads() -> int:
    return torch.get_num_threads()


use("auto")
