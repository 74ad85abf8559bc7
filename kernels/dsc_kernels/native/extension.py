"""The compiled module as `kernels`; where there is none, using it is an error that says why."""

from __future__ import annotations

from typing import Any

__all__ = ["kernels"]


class Missing:
    """In place of the module where dsc_kernels was installed without a compiler."""

    def supported(self) -> list[str]:
        return []

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("dsc_kernels was installed without a compiler: there are no native kernels")


try:
    from dsc_kernels import _native as kernels
except ImportError:
    kernels = Missing()  # type: ignore[assignment]
