"""What a finished run has to say for itself, in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsc_serve.llm import LLM
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.train.settings import TrainSettings

SAMPLE_TOKENS = 80


def samples(model: Path, prompts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Greedy continuations with repetition penalty 1.1."""
    if not prompts:
        return []
    with LLM(str(model)) as llm:
        context_len = llm.engine.capacity.max_model_len
        params = SamplingParams(temperature=0, repetition_penalty=1.1, max_tokens=min(SAMPLE_TOKENS, context_len // 2))
        return [(prompt, llm.generate(prompt, params)[0].text) for prompt in prompts]


def card(summary: dict[str, Any], settings: TrainSettings, continued: list[tuple[str, str]]) -> str:
    """Size, recipe, held-out bits per byte of every source, dead atoms and samples."""
    o, s = settings.optimiser, settings.schedule
    epochs = summary["tokens"] / summary["corpus_tokens"]
    hidden = f", Muon at {o.hidden_rate:g} for the hidden matrices" if o.kind == "muon" else ""
    lines = [
        f"{summary['parameters']:,} parameters, {summary['active_parameters']:,} active per token.",
        "",
        "## Recipe",
        "",
        f"{summary['steps']:,} steps, {summary['tokens'] / 1e6:.1f} M tokens ({epochs:.2f} epochs of "
        f"{summary['corpus_tokens'] / 1e6:.1f} M), {summary['training_seconds'] / 60:.1f} minutes on "
        f"{summary['device']} with {summary['threads']} compute threads. AdamW at {o.rate:g}{hidden}, router rate as "
        f"in the {o.router_rate}, {s.shape} decay to {s.final:g} of the peak; computed in {settings.run.dtype} with "
        "float32 master weights.",
        "",
        "![loss](loss.svg)",
        "",
        "## Held-out bits per byte",
        "",
        f"Full windows of the context without overlap, {summary['held_out_tokens']:,} tokens.",
        "",
        "| source | bits per byte |",
        "|---|---|",
        *(f"| {name} | {bits:.3f} |" for name, bits in sorted(summary["sources"].items(), key=lambda item: item[1])),
        f"| all bytes together | {summary['held_out_bits_per_byte']:.3f} |",
    ]
    if summary["dead"]:
        lines += ["", "![share of the bank used](usage.svg)"]
        lines += ["", f"Never picked on the held-out text, per layer: {', '.join(map(str, summary['dead']))}."]
    if continued:
        lines += ["", "## Samples", "", "Greedy, repetition penalty 1.1; the prompt is in bold.", ""]
        for prompt, text in continued:
            lines += [f"> **{prompt}**{' '.join(text.split(chr(10)))}", ""]
    return "\n".join(lines).rstrip() + "\n"
