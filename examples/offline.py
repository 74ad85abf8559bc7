"""Generate for many prompts in this process, without a server: `python examples/offline.py [MODEL]`."""

from __future__ import annotations

import sys

from dsc_serve import LLM, SamplingParams

PROMPTS = ["Once upon a time", "The history of the city begins", "In Python, a list"]


def main(model: str = "dsc-tiny") -> None:
    greedy = SamplingParams(temperature=0, max_tokens=24)
    drawn = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=24, n=2)
    with LLM(model) as llm:
        # One call, one batch: requests of different lengths and parameters run together.
        for output in llm.generate(PROMPTS, [greedy, drawn, greedy]):
            print(f"{output.index}  {output.text!r}  ({len(output.token_ids)} tokens, {output.finish_reason})")
        (losses,) = llm.losses([llm.tokenizer.encode(PROMPTS[1])] if llm.tokenizer else [[1, 2, 3]])
        print(f"{losses.mean().item():.3f} nats per token of the second prompt")


if __name__ == "__main__":
    main(*sys.argv[1:])
