"""`bench quantised --text`: what forms of weights cost, beside the weights' own values in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsc_kernels import native
from dsc_serve import LLM
from dsc_serve.bench.step.quality import quality
from dsc_serve.cli import main
from dsc_serve.config import EMBEDDED_MODEL, EngineConfig
from dsc_serve.train.evaluation import evaluate

TEXT = "A server loads a model, and tokens that picked the same atoms are computed together.\n"
SMALL = ["--steps", "1", "--rounds", "1", "--threads", "1", "--prompt-tokens", "8", "--streams", "1"]


pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


def test_the_weights_own_values_lose_nothing_and_few_bits_of_inputs_more_than_many() -> None:
    forms = {
        "exact": EngineConfig(dtype="float32", weights="bfloat16", threads=1),
        "int16": EngineConfig(dtype="float32", weights="int8", threads=1),
        "int8": EngineConfig(dtype="float32", weights="int8", activations="int8", threads=1),
    }
    exact, many, few = quality(list(forms.items()), TEXT, 1000)
    with LLM(dtype="float32", weights="bfloat16", threads=1) as llm:
        own = evaluate(llm, TEXT).to_dict()
    assert exact.bits_per_byte == pytest.approx(own["bits_per_byte"], rel=1e-5)
    assert (exact.system, exact.off, exact.argmax) == ("exact", 0, 1) and exact.tokens == own["tokens"] + 1
    assert 0 < many.off < 0.1 and abs(many.bits_per_byte / exact.bits_per_byte - 1) < 0.02
    assert few.off > many.off


def test_each_quantised_form_is_measured_with_each_form_of_inputs(tmp_path: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text(TEXT)
    words = ["bench", "quantised", EMBEDDED_MODEL, "--weights", "bfloat16", "--weights", "int8", *SMALL]
    words += ["--activations", "int8", "--activations", "int16", "--text", str(text), "--text-tokens", "12"]
    done = CliRunner().invoke(main, [*words, "--json", str(file)])
    assert done.exit_code == 0, done.output
    found, names = json.loads(file.read_bytes()), ["bfloat16", "int8, int8 activations", "int8"]
    assert [row["system"] for row in found["quality"]] == [row["system"] for row in found["steps"]] == names
    assert all(row["tokens"] == 12 and row["bits_per_byte"] > 0 for row in found["quality"])
    assert "| int8, int8 activations | 12 |" in done.output


def test_texts_that_cannot_be_measured_are_refused(small_model: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a")
    without = str(small_model("dense", max_position_embeddings=200))
    for model, message in (
        (EMBEDDED_MODEL, "the text has 1 tokens; a loss needs at least 2"),
        (without, "no tokenizer"),
    ):
        done = CliRunner().invoke(main, ["bench", "quantised", model, "--text", str(text), *SMALL])
        assert done.exit_code == 1 and message in done.output
