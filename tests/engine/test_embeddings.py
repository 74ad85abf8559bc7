"""Embeddings by the engine: equal to a float64 reference, in company, in chunks, and as the checkpoint's files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import naive_decoder
from support.small_models import small_config, wide_tensors
from torch import Tensor

from dsc_serve.llm import LLM
from dsc_serve.model.checkpoint import save_checkpoint
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.pooling import Pooling, pooling_of
from dsc_serve.sampling_params import EMBEDDED, EmbeddingParams, SamplingParams

PROMPTS = [[7], [3, 1, 4, 1, 5], [(5 * i + 2) % 61 for i in range(40)], [9, 9, 9]]
KINDS = ("dsc", "moe", "dense")


def write(folder: Path, kind: str, **changes: Any) -> Path:
    config = small_config(kind, **changes)
    save_checkpoint(config, wide_tensors(config), folder / kind)
    return folder / kind


def reference(kind: str, ids: list[int], method: str, dimensions: int | None = None) -> Tensor:
    """In float64: the final norm's output, read through a head that is the identity."""
    config = small_config(kind, tie_word_embeddings=False)
    tensors = wide_tensors(small_config(kind)) | {"lm_head.weight": torch.eye(config.hidden_size)}
    rows = naive_decoder.logits(config, tensors, ids)
    vector = (rows[-1] if method == "last" else rows.mean(0))[:dimensions]
    return vector / vector.norm()


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["last", "mean"])
def test_vectors_are_those_of_the_reference(tmp_path: Path, kind: str, method: str, kernels: str) -> None:
    """In chunks of eight tokens, so that means go over several."""
    model = write(tmp_path, kind)
    sizes: dict[str, Any] = {"step_tokens": 8, "max_running": 4, "block_size": 4, "threads": 1}
    with LLM(str(model), dtype="float32", pooling=method, kernels=kernels, **sizes) as llm:
        got = llm.embed(PROMPTS)
        cut = llm.embed(PROMPTS, dimensions=5)
        torch.testing.assert_close(llm.embed(PROMPTS), got)  # what a prefix cache holds changes nothing
        assert llm.embed([]).shape == (0, 32)
    for i, ids in enumerate(PROMPTS):
        torch.testing.assert_close(got[i].double(), reference(kind, ids, method), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(cut[i].double(), reference(kind, ids, method, 5), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["last", "mean"])
def test_they_are_the_same_beside_generations_and_through_preemptions(tmp_path: Path, method: str) -> None:
    model = write(tmp_path, "dsc")
    sizes: dict[str, Any] = {"step_tokens": 8, "max_running": 4, "block_size": 4, "threads": 1, "kv_tokens": 48}
    prompts = [[(11 * i + 5 * j) % 61 for j in range(9)] for i in range(len(PROMPTS))]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM(str(model), dtype="float32", pooling=method, **sizes) as llm:
        vectors: dict[str, bytes] = {}
        tokens: dict[str, list[int]] = {}
        for i, ids in enumerate(PROMPTS):
            llm.engine.add(f"g{i}", prompts[i], params)
            llm.engine.add(f"e{i}", ids, EMBEDDED, embedding=EmbeddingParams())
        while llm.engine.has_work:
            for delta in llm.engine.step():
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                if delta.embedding is not None:
                    vectors[delta.request_id] = delta.embedding
                    assert delta.finish_reason == "length"
        assert llm.engine.scheduler.preemptions > 0
        alone = [output.token_ids for output in llm.generate(prompts, params)]
    assert [tokens[f"g{i}"] for i in range(len(PROMPTS))] == alone
    for i, ids in enumerate(PROMPTS):
        got = torch.frombuffer(bytearray(vectors[f"e{i}"]), dtype=torch.float32).double()
        torch.testing.assert_close(got, reference("dsc", ids, method), atol=2e-5, rtol=1e-4)


def test_in_bfloat16_they_are_near(tmp_path: Path) -> None:
    with LLM(str(write(tmp_path, "dense")), dtype="bfloat16", pooling="mean", threads=1) as llm:
        got = llm.embed(PROMPTS)
    for vector, ids in zip(got, PROMPTS, strict=True):
        assert float(vector.double() @ reference("dense", ids, "mean")) > 0.99


def test_what_cannot_be_embedded_is_named(tmp_path: Path) -> None:
    with LLM(str(write(tmp_path, "dense")), dtype="float32", threads=1) as llm:
        for prompts, dimensions, field in (([[]], None, "prompt"), ([[1]], 33, "dimensions"), ([[1]], 0, "dimensions")):
            with pytest.raises(ParameterError) as error:
                llm.embed(prompts, dimensions=dimensions)
            assert error.value.field == field
        assert not llm.engine.has_work


MODES = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")


def files(folder: Path, modules: list[str] | None, mode: str | None, place: str = "1_Pooling") -> Path:
    if modules is not None:
        listed = [
            {
                "idx": i,
                "name": str(i),
                "path": place if kind == "Pooling" else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
    if mode is not None:
        (folder / place).mkdir()
        content = {f"pooling_mode_{name}": name == mode for name in MODES}
        (folder / place / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **content}))
    return folder


WHOLE = ["Transformer", "Pooling", "Normalize"]


@pytest.mark.parametrize(
    ("modules", "mode", "setting", "expected"),
    [
        (None, None, "auto", Pooling("last", True)),
        (None, None, "mean", Pooling("mean", True)),
        (None, "mean_tokens", "auto", Pooling("mean", True)),
        (WHOLE, "lasttoken", "auto", Pooling("last", True)),
        (WHOLE, "mean_tokens", "auto", Pooling("mean", True)),
        (WHOLE[:2], "mean_tokens", "auto", Pooling("mean", False)),
        (WHOLE[:2], "mean_tokens", "last", Pooling("last", False)),
    ],
)
def test_a_checkpoints_own_files_say_how(
    tmp_path: Path, modules: list[str] | None, mode: str | None, setting: str, expected: Pooling
) -> None:
    assert pooling_of(files(tmp_path, modules, mode), setting) == expected


def test_its_pooling_may_lie_in_another_folder(tmp_path: Path) -> None:
    assert pooling_of(files(tmp_path, WHOLE, "mean_tokens", "pool"), "auto") == Pooling("mean", True)


@pytest.mark.parametrize(
    ("modules", "mode", "words"),
    [
        (["Transformer", "Pooling", "Dense"], "mean_tokens", "module 'Dense'"),
        (WHOLE, "cls_token", "cls_token"),
        (WHOLE, "nothing of these", "nothing"),
    ],
)
def test_what_is_not_supported_is_a_fault_unless_the_operator_decides(
    tmp_path: Path, modules: list[str], mode: str, words: str
) -> None:
    folder = files(tmp_path, modules, mode)
    fault = pooling_of(folder, "auto").fault
    assert words in fault and fault.endswith("set pooling to last or mean")
    assert not pooling_of(folder, "mean").fault


@pytest.mark.parametrize("text", ["", "5", "[5]", "{", "\x00"])
def test_files_that_make_no_sense_are_faults(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    assert pooling_of(tmp_path, "auto").fault


def test_vectors_that_the_checkpoint_leaves_long_stay_so(tmp_path: Path) -> None:
    model = files(write(tmp_path, "dense"), WHOLE[:2], "mean_tokens")
    with LLM(str(model), dtype="float32", threads=1) as llm:
        long, cut = llm.embed([[3, 1, 4]]), llm.embed([[3, 1, 4]], dimensions=8)
    assert abs(float(long.norm()) - 1) > 0.1
    torch.testing.assert_close(
        (long / long.norm())[0].double(), reference("dense", [3, 1, 4], "mean"), atol=2e-5, rtol=1e-4
    )
    assert abs(float(cut.norm()) - 1) < 1e-5
