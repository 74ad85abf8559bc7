"""The kinds of adapters, by what a folder of one holds: a registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dsc_serve.model.adapter import Adapter
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.cores.reader import holds_cores, read_cored
from dsc_serve.model.origin import Origin
from dsc_serve.model.peft import read_adapter as read_peft
from dsc_serve.model.tenant import holds_tenant, read_tenant

Reader = Callable[[Path, ModelConfig, Origin | None], Adapter]


class AdapterKind(NamedTuple):
    """A kind of adapters in folders."""

    holds: Callable[[Path], bool]  # whether a folder holds an adapter of this kind
    read: Reader  # it


KINDS: dict[str, AdapterKind] = {
    "cores": AdapterKind(holds_cores, read_cored),
    "dsc": AdapterKind(holds_tenant, lambda folder, config, origin: read_tenant(folder, config)),
}


def read_adapter(folder: Path, config: ModelConfig, origin: Origin | None = None) -> Adapter:
    """The adapter in a folder, of whatever kind, for a base of this configuration; what is of no other is PEFT's.

    Raises BrokenAdapterError.
    """
    found = next((kind.read for kind in KINDS.values() if kind.holds(folder)), read_peft)
    return found(folder, config, origin)
