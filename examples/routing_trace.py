"""Which atoms the tokens of a prompt pick, layer by layer: `python examples/routing_trace.py [URL] [PROMPT]`."""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any


def post(url: str, **body: object) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def main(url: str = "http://127.0.0.1:8000", prompt: str = "The city and the cities") -> None:
    routing = post(f"{url}/v1/dsc/trace", prompt=prompt, top_k_atoms=2)["dsc"]["routing"]
    ids, atoms, signal = routing["token_ids"], routing["atoms"], routing["signal"]  # [T], [T][layers][k], [T][layers]
    texts = [post(f"{url}/detokenize", tokens=[token])["prompt"] for token in ids]
    print("token".ljust(12), *(f"layer {layer}".rjust(10) for layer in range(len(atoms[0]))))
    for text, picks in zip(texts, atoms, strict=True):
        print(repr(text).ljust(12), *(",".join(map(str, layer)).rjust(10) for layer in picks))
    strongest = max(range(len(ids)), key=lambda token: max(signal[token]))
    print(f"the dynamic part is strongest at {texts[strongest]!r}: signal {max(signal[strongest]):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
