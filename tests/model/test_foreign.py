"""Checkpoints of other forms give, as they are, what transformers and llama.cpp give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.foreign import ARCHITECTURES, FILES, FOLDERS, PROMPT, expected, file_of, folder_of

from dsc_serve import LLM


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_gives_the_logits_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = expected("transformers")
    folder = folder_of(case, tmp_path / "model")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with LLM(str(folder), dtype="float32") as llm:
        logits = llm.logits([PROMPT])[0][-1]
    torch.testing.assert_close(logits, torch.tensor(theirs["logits"][case]), atol=2e-3, rtol=1e-3)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before  # nothing is written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", FILES)
def test_a_file_gives_the_probabilities_of_llama_cpp(case: str, architecture: str, tmp_path: Path) -> None:
    theirs = expected("llama_cpp")["logprobs"][f"{architecture}: {case}"]
    with LLM(str(file_of(case, architecture, tmp_path / "m.gguf")), dtype="float32") as llm:
        logprobs = torch.log_softmax(llm.logits([PROMPT])[0][-1].double(), dim=0)
    assert len(theirs) > 20
    ours = {token: logprobs[int(token)].item() for token in theirs}
    assert ours == pytest.approx(theirs, abs=2e-3)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.gguf"]


@pytest.mark.parametrize("name", ["transformers", "llama_cpp"])
def test_the_cases_differ(name: str) -> None:
    """Expected values that were all alike would show nothing."""
    (found,) = (value for key, value in expected(name).items() if key != "versions")
    assert len({str(value) for value in found.values()}) > len(found) / 2
