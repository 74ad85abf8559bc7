"""The forms in which adapters lie in folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dsc_serve.model.adapter import Adapter
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.cores.reader import holds_cores, read_cored
from dsc_serve.model.origin import Origin
from dsc_serve.model.peft import read_adapter as read_peft


class AdapterForm(NamedTuple):
    """holds: whether a folder is of this form. read: raises BrokenAdapterError."""

    holds: Callable[[Path], bool]
    read: Callable[[Path, ModelConfig, Origin | None], Adapter]


FORMS = {
    "cores": AdapterForm(holds_cores, read_cored),
    "peft": AdapterForm(lambda folder: True, read_peft),  # which says what is missing
}


def read_adapter(folder: Path, config: ModelConfig, origin: Origin | None = None) -> Adapter:
    """The adapter in a folder, under the folder's name, by the first form that it is of. Raises BrokenAdapterError."""
    form = next(form for form in FORMS.values() if form.holds(folder))
    return form.read(folder, config, origin)
