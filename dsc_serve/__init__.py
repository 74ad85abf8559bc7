"""Inference serving for language models with Dynamic Subspace Composition (DSC) feed-forward layers.

What it offers is loaded on first use, so that importing this package stays cheap and free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsc_serve.llm import LLM, GenerationError, RequestOutput
    from dsc_serve.sampling_params import SamplingParams, StructuredOutputs

__version__ = "0.1.0"
__all__ = ["LLM", "GenerationError", "RequestOutput", "SamplingParams", "StructuredOutputs", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "GenerationError", "RequestOutput"):
        import dsc_serve.llm as llm

        return getattr(llm, name)
    if name in ("SamplingParams", "StructuredOutputs"):
        from dsc_serve import sampling_params

        return getattr(sampling_params, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
