"""Each token's most likely word is the first largest logit, also where the head is screened in int8."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.native_cases import CASES, DTYPES, Guarded
from support.weight_kinds import INPUTS, WEIGHTS
from torch import Tensor

from dsc_kernels import native, ops
from dsc_kernels.native import head
from dsc_kernels.native.screen import MAX_WIDTH

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("instruction_set"),
]


@pytest.fixture(params=["exact", "int8-certified"], autouse=True)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use_head(request.param)
    yield request.param
    native.use_head("auto")


def first_largest(logits: Tensor) -> list[int]:
    """Of each row; NaN is never the largest, and 0 stands for a row without a number above −∞."""
    row = torch.where(logits.isnan(), -torch.inf, logits)
    return [int((r == r.max()).nonzero()[0]) for r in row]


@CASES
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(sorted(WEIGHTS)),
    inputs=st.sampled_from(sorted(INPUTS)),
    batch=st.one_of(st.integers(0, 14), st.integers(60, 70)),
    d=st.integers(1, 90),
    words=st.one_of(st.integers(1, 300), st.integers(2000, 2100)),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
)
def test_it_is_the_argmax_of_the_logits(
    guarded: Guarded,
    seed: int,
    kind: str,
    inputs: str,
    batch: int,
    d: int,
    words: int,
    dtype: torch.dtype,
    biased: bool,
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight, x = WEIGHTS[kind](g, words, d).to(dtype), INPUTS[inputs](g, batch, d).to(dtype)
    bias = torch.randn(words, generator=g) if biased else None
    made = native.Head(weight, bias)
    got = made.argmax(x)
    assert got.shape == (batch,)
    if batch:
        assert got.tolist() == first_largest(made(x, out_dtype=torch.float32))


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), float("inf")])
def test_logits_that_are_no_numbers_are_an_index_in_range(guarded: Guarded, value: float) -> None:
    assert native.Head(torch.ones(40, 3)).argmax(torch.full((2, 3), value)).tolist() == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_and_tokens_that_are_not_finite_touch_no_others(value: float) -> None:
    g = torch.Generator().manual_seed(3)
    weight, x = torch.randn(3000, 48, generator=g), torch.randn(9, 48, generator=g)
    clean = native.Head(weight).argmax(x)
    weight[2999, 5], x[4, 7] = value, value
    made = native.Head(weight)
    got = made.argmax(x)
    assert got.tolist() == first_largest(made(x, out_dtype=torch.float32))
    unharmed = [i for i in range(9) if i != 4 and got[i] != 2999]
    assert torch.equal(got[unharmed], clean[unharmed])


@pytest.mark.parametrize("threads", [1, 2])
def test_few_panels_are_multiplied_again_and_counted(precision: str, threads: int) -> None:
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(20000, 384, generator=g) / 20
    weight[10000:, 0] -= 1  # the second thread's words: no likely ones, and all alike
    made = native.Head(weight.bfloat16())
    x = torch.randn(100, 384, generator=g)
    x[:, [5, 6, 200]] *= 40  # without a second digit for these, most words would be nominees
    x[:, 0] = 20
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    got = made.argmax(x.bfloat16()).tolist()
    torch.set_num_threads(before)
    assert got == first_largest(made(x.bfloat16(), out_dtype=torch.float32))
    if precision == "exact":
        assert not made.screened
        return
    assert made.screened
    panels, tokens = made.screen.count("rescored"), made.screen.count("tokens")
    assert tokens == 100
    assert 1 <= panels / tokens < 12


def test_a_head_that_screening_does_not_help_is_multiplied_out(precision: str) -> None:
    """All words are alike, so all are nominees: it is found out in 8 calls, and tried again after 512."""
    made = native.Head(torch.ones(2000, 16))
    for calls, screened in ((9, 8), (511, 8), (1, 9), (10, 16)):
        for _ in range(calls):
            assert made.argmax(torch.ones(3, 16)).tolist() == [0] * 3
        if precision != "exact":
            counted = made.screen.count("rescored"), made.screen.count("tokens")
            assert counted == (3 * 125 * screened, 3 * screened)


def test_auto_screens_large_heads_where_int8_is_fast() -> None:
    native.use_head("auto")
    assert native.screens_head(head.SCREENED_WORDS, 64) == (native.active() in native.SCREENING_SETS)
    assert not native.screens_head(head.SCREENED_WORDS - 1, 64)
    assert not native.screens_head(head.SCREENED_WORDS, MAX_WIDTH + 1)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head_precision 'int4' is not known; allowed: auto, exact, int8-certified"):
        native.use_head("int4")  # type: ignore[arg-type]


def test_plain_torch_finds_the_same() -> None:
    g = torch.Generator().manual_seed(5)
    weight, x = torch.randint(-3, 4, (70, 12), generator=g).float(), torch.randint(-3, 4, (6, 12), generator=g).float()
    native_indices = ops.head(weight).argmax(x)
    active = native.active()
    native.use("plain")
    plain_indices = ops.head(weight).argmax(x)
    native.use(active or "plain")
    assert torch.equal(native_indices, plain_indices)
