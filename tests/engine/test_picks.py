"""What tokens picked is reported: right, once for every position, and without changing what is generated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_kernels.weights import AtomBank, FfnOptions, MlpWeights, Router
from dsc_serve import LLM, RequestOutput, SamplingParams
from dsc_serve.engine.output import RoutingSlice
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import MAX_PICKS, EngineCapacity, resolve_max_tokens

PROMPTS = [[1, 2, 3, 4, 5], [7] * 8, list(range(12))]


def routed(llm: LLM, prompt: list[int], **fields: object) -> tuple[RequestOutput, RoutingSlice]:
    (output,) = llm.generate([prompt], SamplingParams(**fields))  # type: ignore[arg-type]
    assert output.routing is not None
    return output, output.routing


def test_picks_are_those_of_the_reference_script(
    golden_folder: Callable[[str], Path], golden_io: Callable[[str], dict[str, Tensor]]
) -> None:
    io = golden_io("dsc")
    rows = io["input_ids"]
    with LLM(str(golden_folder("dsc")), dtype="float32", threads=1, step_tokens=64) as llm:
        k = llm.engine.capacity.picks_per_token
        params = SamplingParams(max_tokens=0, routing=k)
        for row, output in enumerate(llm.generate(rows.tolist(), params)):
            assert output.routing is not None
            atoms, coefficients, signal = output.routing.arrays
            tokens = slice(row * rows.shape[1], (row + 1) * rows.shape[1])
            for layer in llm.engine.capacity.picking:
                name = f"blocks.{layer}.ffn"
                np.testing.assert_allclose(signal[:, layer], io[f"{name}.signal"][tokens, 0], rtol=1e-4)
                np.testing.assert_allclose(coefficients[:, layer], io[f"{name}.coefficients"][tokens], atol=1e-5)
                ours, theirs = np.sort(atoms[:, layer]), np.sort(io[f"{name}.atoms"][tokens])
                assert (ours == theirs).all(axis=1).mean() > 0.95  # atoms at the clamp tie


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_reporting_changes_nothing_that_is_generated(
    small_model: Callable[..., Path], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(small_model()), kernels=kernels, threads=1) as llm:
        plain, reported = (
            llm.generate(PROMPTS, SamplingParams(max_tokens=12, seed=3, routing=k, logprobs=0)) for k in (0, 3)
        )
    ops.use("auto")
    assert [output.logprobs for output in plain] == [output.logprobs for output in reported]
    assert all(output.routing is None for output in plain)
    for output in reported:
        assert output.routing is not None
        assert output.routing.start == 0
        assert output.routing.shape == (len(output.prompt_token_ids) + 11, 2, 3)


def test_fewer_atoms_are_the_strongest(small_model: Callable[..., Path]) -> None:
    with LLM(str(small_model()), dtype="float32", threads=1) as llm:
        _, three = routed(llm, PROMPTS[2], max_tokens=1, routing=3)
        _, one = routed(llm, PROMPTS[2], max_tokens=1, routing=1)
    atoms, coefficients, signal = three.arrays
    assert (np.diff(coefficients, axis=-1) <= 0).all()
    np.testing.assert_allclose(coefficients.sum(axis=-1), np.tanh(signal), rtol=1e-4)
    np.testing.assert_array_equal(one.arrays[0], atoms[..., :1])


def test_every_position_is_reported_once_though_requests_are_preempted_and_prompts_chunked(
    small_model: Callable[..., Path],
) -> None:
    folder = str(small_model())
    params = [SamplingParams(max_tokens=30, seed=i, routing=2 if i != 1 else 0) for i in range(3)]
    with LLM(folder, dtype="float32", threads=1) as roomy:
        alone = [roomy.generate([prompt], own)[0] for prompt, own in zip(PROMPTS, params, strict=True)]
    with LLM(folder, dtype="float32", threads=1, max_running=4, step_tokens=7, block_size=4, kv_tokens=60) as llm:
        narrow = llm.generate(PROMPTS, params)
        assert llm.engine.scheduler.preemptions > 0
    assert narrow[1].routing is None
    for output, expected in ((narrow[0], alone[0]), (narrow[2], alone[2])):
        assert output.token_ids == expected.token_ids
        assert output.routing is not None and expected.routing is not None
        assert output.routing.shape == expected.routing.shape
        for got, want in zip(output.routing.arrays, expected.routing.arrays, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4)


def test_a_stream_reports_as_it_goes(small_model: Callable[..., Path]) -> None:
    with LLM(str(small_model()), threads=1, step_tokens=64) as llm:
        parts = [new.routing for new in llm.stream(PROMPTS[0], SamplingParams(max_tokens=5, routing=2))]
    assert [part and (part.start, part.shape[0]) for part in parts] == [(0, 5), (5, 1), (6, 1), (7, 1), (8, 1)]


def test_a_dense_model_has_nothing_to_report(small_model: Callable[..., Path]) -> None:
    with LLM(str(small_model("dense")), threads=1) as llm, pytest.raises(ParameterError, match="pick nothing"):
        llm.generate([[1]], SamplingParams(routing=1))


def test_what_cannot_be_reported_is_refused() -> None:
    capacity = EngineCapacity(100, 10**6, 10**6, 16, picks="atoms", picking=tuple(range(8)), picks_per_token=4)
    for params, words in (
        (SamplingParams(routing=5), "at most 4"),
        (SamplingParams(routing=4, max_tokens=MAX_PICKS // 32), "picks; at most"),
        (SamplingParams(routing=-1, max_tokens=None), "picks; at most"),
    ):
        with pytest.raises(ParameterError, match=words) as error:
            resolve_max_tokens([1], params, capacity)
        assert error.value.field == "routing"
    assert resolve_max_tokens([1], SamplingParams(routing=4, max_tokens=MAX_PICKS // 32 - 1), capacity)
    with pytest.raises(ParameterError, match=r"-1 \(all atoms\)"):
        SamplingParams(routing=-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_routed_layer_gives_the_same_output_bit_for_bit(dtype: torch.dtype, kernels: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    try:
        ops.use(kernels)
        router, bank = Router(random(37, 32)), AtomBank(random(37, 32), random(37, 32), random(32).float())
        options = FfnOptions(activation="gelu", k=3, tau=20.0, eps=1e-6)
        layer = ops.ffn(MlpWeights(random(24, 32), None, random(32, 24)), options, router, bank)
        x, residual = random(tokens, 32), random(tokens, 32)
        assert torch.equal(layer(x, residual), layer.routed(x, residual)[0])
        assert torch.equal(layer(x), layer.routed(x)[0])
    finally:
        ops.use("auto")
