"""Writes expected.json: greedy texts of the embedded model in float32, by plain torch on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

from dsc_serve import LLM, SamplingParams

FILE = Path(__file__).with_name("expected.json")
PROMPTS = [
    *("The history of the city begins", "Once upon a time", "In 1962 the first", "def main():"),
    *("The", " = Early life = \n", "Water boils at", "It was a dark night and"),
]


def texts() -> dict[str, str]:
    with LLM(dtype="float32", kernels="plain") as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=48))
    return {prompt: output.text for prompt, output in zip(PROMPTS, outputs, strict=True)}


if __name__ == "__main__":
    FILE.write_text(json.dumps(texts(), indent=1) + "\n", encoding="utf-8")
