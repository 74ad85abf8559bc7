"""The kinds of adapters, by the file that a folder of one holds: a registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dsc_serve.model import tenant
from dsc_serve.model.adapter import Adapter
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.origin import Origin
from dsc_serve.model.peft import read_adapter as read_peft

Reader = Callable[[Path, ModelConfig, Origin | None], Adapter]

KINDS: dict[str, Reader] = {tenant.FILE: lambda folder, config, origin: tenant.read_tenant(folder, config)}


def read_adapter(folder: Path, config: ModelConfig, origin: Origin | None = None) -> Adapter:
    """The adapter in a folder, of whatever kind, for a base of this configuration; what is of no other is PEFT's.

    Raises BrokenAdapterError.
    """
    found = next((read for name, read in KINDS.items() if (folder / name).is_file()), read_peft)
    return found(folder, config, origin)
