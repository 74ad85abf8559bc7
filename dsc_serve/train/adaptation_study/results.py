"""What a study of adapters has found so far, as one JSON document, from what its stages have left."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from dsc_serve import __version__
from dsc_serve.machine import default_threads
from dsc_serve.train.adaptation_study.matrix import BASE, Rows
from dsc_serve.train.adaptation_study.plan import (
    SHARED,
    STUDIED,
    EqualLora,
    lora_bytes,
    run_settings,
    shared_bytes,
    tenant_bytes,
)
from dsc_serve.train.adaptation_study.stages import CERTIFICATES
from dsc_serve.train.adaptation_study.study import MATRIX, AdaptationStudy
from dsc_serve.train.study_report import machine

Results = dict[str, Any]


def results(study: AdaptationStudy, missing: Sequence[str], command: str) -> Results:
    """missing: names of stages that are not done; of what they would give nothing is told."""
    settings = run_settings(study.options, "lora")
    base = Rows.read(study.folder / MATRIX / f"{BASE}.json").bits.get(BASE, {})
    found: Results = {
        "command": command,
        "version": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "threads": settings.threads or default_threads(),
        "base": {"name": study.place.name, **sizes(study)},
        "options": {**study.options.to_dict(), "length": settings.length},
        "texts": {
            own.name: {
                "training_tokens": len(own.corpus.train),
                "held_out_tokens": study.held[own.name].tokens,
                "held_out_bytes": study.held[own.name].size,
            }
            for own in study.tenants
        },
        "missing": list(missing),
        "base_bits": base,
        "kinds": {},
        "equal_bytes": {},
    }
    further = {lora.name: lora for lora in study.further()}
    for kind in (*study.kinds, *further):
        own = one_kind(study, kind, further.get(kind))
        if own is not None:
            found["kinds"][kind] = own
    for kind, lora in study.equal().items():
        beside = lora.name if lora.name in further else "lora"
        if kind in found["kinds"] and beside in found["kinds"]:
            found["equal_bytes"][kind] = beside
    if SHARED in found["kinds"]:
        found["certificates"] = json.loads((study.folder / CERTIFICATES).read_text("utf8"))
    refusal = study.folder / "refusal.json"
    if SHARED in study.kinds and refusal.is_file():
        found["refusal"] = json.loads(refusal.read_text("utf8"))
    return found


def sizes(study: AdaptationStudy) -> dict[str, int]:
    c = study.config
    return {"layers": c.num_hidden_layers, "width": c.hidden_size, "vocabulary": c.vocab_size}


def one_kind(study: AdaptationStudy, kind: str, lora: EqualLora | None = None) -> Results | None:
    """lora: what it is where it is none of the study's kinds. None where a row of its matrix is missing."""
    bits = Rows.read(study.folder / MATRIX / f"{kind}.json").bits
    names = [kind] if kind == "mixed" else study.place.names
    if set(names) - bits.keys():
        return None
    trained = "lora" if kind == SHARED else kind
    summary = json.loads((study.folder / trained / "summary.json").read_text("utf8"))
    config, options = study.config, study.options
    seconds = summary["seconds"] + (study.seconds_of("share a basis") if kind == SHARED else 0.0)
    return {
        "title": STUDIED[kind] if lora is None else lora.title,
        "tenant_bytes": tenant_bytes(config, options, kind) if lora is None else lora_bytes(config, options, lora),
        "shared_bytes": shared_bytes(config, options, kind) if lora is None else 0,
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "training_seconds": round(seconds, 1),
        "dtype": summary["dtype"],
        "bits": {name: bits[name] for name in names},
    }
