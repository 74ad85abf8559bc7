"""An opening, continued by a model and all tenants of its bank: `python examples/tenants.py MODEL ADAPTERS`."""

from __future__ import annotations

import sys
from pathlib import Path

from dsc_serve import LLM, SamplingParams


def main(model: str, adapters: str, prompt: str = "In the beginning", tokens: str = "48") -> None:
    names = sorted(folder.name for folder in Path(adapters).iterdir() if (folder / "dsc_adapter.safetensors").is_file())
    params = SamplingParams(max_tokens=int(tokens), temperature=0)
    with LLM(model, adapters=adapters) as llm:
        every = [None, *names]
        for name, answer in zip(every, llm.generate([prompt] * len(every), params, adapter=every), strict=True):
            print(f"{name or 'base'}: {answer.text!r}")
        watch = llm.engine.routing
        for own in [] if watch is None else watch.tenant_report().tenants:
            nearest = max(own.overlap, key=own.overlap.__getitem__, default="nobody")
            distinct = sum(own.distinct) / len(own.distinct)
            print(f"{own.name} picked {distinct:.0f} atoms a layer, signal {own.signal:.2f}, most like {nearest}")


if __name__ == "__main__":
    main(*sys.argv[1:])
