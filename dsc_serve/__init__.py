"""Inference serving for language models with Dynamic Subspace Composition (DSC) feed-forward layers.

What it offers is loaded on first use, so that importing this package stays cheap and free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsc_serve.config import ConfigError
    from dsc_serve.llm import LLM, GenerationError, RequestOutput
    from dsc_serve.model.config import CheckpointError
    from dsc_serve.parameter_errors import ParameterError
    from dsc_serve.sampling_params import SamplingParams
    from dsc_serve.structured_outputs import StructuredOutputs
    from dsc_serve.text.tokenizer import TokenizerError

__version__ = "0.1.0"
MODULES = {
    "LLM": "dsc_serve.llm",
    "CheckpointError": "dsc_serve.model.config",
    "ConfigError": "dsc_serve.config",
    "GenerationError": "dsc_serve.llm",
    "ParameterError": "dsc_serve.parameter_errors",
    "RequestOutput": "dsc_serve.llm",
    "SamplingParams": "dsc_serve.sampling_params",
    "StructuredOutputs": "dsc_serve.structured_outputs",
    "TokenizerError": "dsc_serve.text.tokenizer",
}
__all__ = [
    "LLM",
    "CheckpointError",
    "ConfigError",
    "GenerationError",
    "ParameterError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TokenizerError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
