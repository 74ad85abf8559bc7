"""How a checkpoint's hidden states become one vector of a text: as its files say, in the form of sentence-transformers.

No torch: the files are read while the model is loaded, and what they say travels between processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from dsc_serve.documents import DocumentError, parse_json, read_document
from dsc_serve.files import CheckpointError
from dsc_serve.gguf_file import open_gguf

MODULES_FILE, POOLING_FILE = "modules.json", "config.json"
POOLING_FOLDER = "1_Pooling"
MODE = "pooling_mode_"
# The field's names of what is supported here.
METHODS = {"lasttoken": "last", "last": "last", "mean_tokens": "mean", "mean": "mean"}
GGUF_METHODS = {1: "mean", 3: "last"}
MOST_BYTES = 2**20


class Pooling(msgspec.Struct, frozen=True):
    """How a text's vector is made."""

    method: str = "last"  # `last` or `mean`, over the positions of a text
    normalise: bool = True  # to length 1
    fault: str = ""  # why texts cannot be embedded as the checkpoint's files say, "" where they can


def pooling_of(model: Path, setting: str) -> Pooling:
    """What the setting `pooling` means for a model's folder or GGUF file.

    auto: as its files say, and `last` where they say nothing. What else is asked for replaces that, but whether vectors
    are normalised remains the checkpoint's own affair.
    """
    try:
        own = _of_gguf(model) if model.is_file() else _of_folder(model)
    except (OSError, DocumentError, CheckpointError, _UnusableError) as error:
        own = Pooling(fault=f"{error}; set pooling to last or mean")
    return own if setting == "auto" else Pooling(setting, own.normalise)


class _UnusableError(ValueError):
    """Files that say what is not supported, or nothing that makes sense."""


def _of_folder(folder: Path) -> Pooling:
    modules, path = folder / MODULES_FILE, folder / POOLING_FOLDER / POOLING_FILE
    normalise = True
    if modules.exists():
        listed = parse_json(read_document(modules, MOST_BYTES))
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise _UnusableError(f"{MODULES_FILE} is no list of modules")
        kinds = [str(one.get("type", "")).rpartition(".")[2] for one in listed]
        other = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
        if other:
            raise _UnusableError(f"{MODULES_FILE} has a module {other[0]!r}, which is not supported")
        normalise = "Normalize" in kinds
        own = next((str(one.get("path", "")) for one in listed if str(one.get("type", "")).endswith(".Pooling")), "")
        if own and "/" not in own and own not in (".", ".."):
            path = folder / own / POOLING_FILE
    if not path.exists():
        return Pooling(normalise=normalise)
    return Pooling(_method(parse_json(read_document(path, MOST_BYTES)), path), normalise)


def _method(content: Any, path: Path) -> str:
    if not isinstance(content, dict):
        raise _UnusableError(f"{path.parent.name}/{path.name} is no object")
    modes = [name.removeprefix(MODE) for name, on in content.items() if name.startswith(MODE) and on is True]
    if isinstance(content.get("pooling_mode"), str):
        modes = [content["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in METHODS:
        raise _UnusableError(f"this checkpoint pools by {' and '.join(modes) or 'nothing'}, which is not supported")
    return METHODS[modes[0]]


def _of_gguf(file: Path) -> Pooling:
    metadata = open_gguf(file).metadata
    kind = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
    if kind in (None, 0):  # 0: none
        return Pooling()
    if kind not in GGUF_METHODS:
        raise _UnusableError(f"this checkpoint has the pooling type {kind}, which is not supported")
    return Pooling(GGUF_METHODS[kind])
