"""What transformers' configurations have where a field is left out, stored in tests/data/family_defaults.json.

They are written again with an interpreter that has transformers:

    PYTHONPATH=tests python -m support.family_defaults PYTHON
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from dsc_serve.model.architectures import ARCHITECTURES
from support.small_models import DATA

FILE = DATA / "family_defaults.json"
TRANSFORMERS = """
import json, sys, transformers
found = {"transformers": transformers.__version__}
for name in json.loads(sys.argv[1]):
    kind = getattr(transformers, name).config_class
    shared = transformers.PreTrainedConfig.__dataclass_fields__.keys() - {"tie_word_embeddings"}
    content = {own.name: own.default for own in kind.__dataclass_fields__.values() if own.name not in shared}
    rope = getattr(kind(), "rope_parameters", None) or {}
    content |= {key: rope.get("full_attention", rope).get(key) for key in ("rope_theta", "partial_rotary_factor")}
    content["rope_local_base_freq"] = rope.get("sliding_attention", {}).get("rope_theta")
    found[name] = {key: value for key, value in sorted(content.items()) if isinstance(value, (bool, int, float, str))}
print(json.dumps(found, indent=1))
"""


def stored_defaults() -> dict[str, dict[str, Any]]:
    """By architecture the fields that are no object, list or null."""
    return {name: own for name, own in json.loads(FILE.read_text()).items() if isinstance(own, dict)}


if __name__ == "__main__":
    command = [sys.argv[1], "-c", TRANSFORMERS, json.dumps(list(ARCHITECTURES))]
    FILE.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
