"""What crosses into C++ and between backends has names on both sides, from one table each."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.layer_parts import ffn_parts
from support.native_cases import random, routed_layer

import dsc_kernels
from dsc_kernels import native, plain
from dsc_kernels.backend import Backend
from dsc_kernels.native.adapters import NO_RUNS, layer_runs
from dsc_kernels.sketch import Sketch
from dsc_kernels.weights import Adapted, FfnOptions, MoeOptions

compiled = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
BACKENDS: list[Backend] = [plain, native]


def stub() -> dict[str, dict[str, str]]:
    """The named arguments of every function in `_native.pyi` that has any, and their types."""
    source = (Path(dsc_kernels.__file__).parent / "_native.pyi").read_text()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    named = {f.name: {a.arg: ast.unparse(a.annotation or ast.Name("")) for a in f.args.kwonlyargs} for f in functions}
    return {name: arguments for name, arguments in named.items() if arguments}


@compiled
def test_the_stub_has_the_arguments_of_the_tables_in_cpp() -> None:
    assert stub() == native.kernels.signatures()


@compiled
def test_an_argument_that_is_missing_unknown_or_without_a_name_is_refused() -> None:
    norm: Any = native.kernels.norm
    arguments = dict.fromkeys(native.kernels.signatures()["norm"], 0)
    norm(**arguments)
    refusals: list[tuple[str, Callable[[], object]]] = [
        ("lacks the argument 'eps'", lambda: norm(**{k: v for k, v in arguments.items() if k != "eps"})),
        ("takes no argument 'epsilon'", lambda: norm(**arguments, epsilon=0)),
        ("takes 0 arguments without a name, but 10 were given", lambda: norm(*arguments.values())),
        ("must be real number, not str", lambda: norm(**{**arguments, "eps": "small"})),
        ("'float' object cannot be interpreted as an integer", lambda: norm(**{**arguments, "batch": 1.5})),
    ]
    for message, call in refusals:
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(OverflowError, match="32 bits"):
        norm(**{**arguments, "threads": 2**40})
    norm(**dict(reversed(arguments.items())))  # their order means nothing


CALLED = [native.Linear.__call__, native.Head.argmax, native.Ffn._run, native.Moe._run, native.Stack.__call__]
CALLED += [native.norm, native.store_kv, native.decode_attention, native.chunk_attention, native.sample]
CALLED += [native.min_hash_order, native.tile_unions, Sketch.observe]


@pytest.mark.parametrize("function", CALLED, ids=lambda function: function.__qualname__)
def test_names_of_arguments_stand_where_a_step_calls(function: Callable[..., object]) -> None:
    """Of those out of a dict a new one is made at every call."""
    parsed = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node for node in ast.walk(parsed) if isinstance(node, ast.Call)]
    into_cpp = [node for node in calls if ast.unparse(node.func).startswith("kernels.")]
    assert into_cpp and all(keyword.arg is not None for node in into_cpp for keyword in node.keywords)


@compiled
def test_names_may_come_in_any_tuple_and_order() -> None:
    """After a call with the same strings in another tuple, with others, and with one that is missing."""
    order = list(native.kernels.signatures()["norm"])
    x, weight = torch.randn(3, 8), torch.rand(8)
    found = []
    for names in (order, order, order[::-1], [*order[5:], *order[:5]], order):
        out = torch.empty(3, 8)
        given = {
            "x": x.data_ptr(),
            "weight": weight.data_ptr(),
            "out": out.data_ptr(),
            "batch": 3,
            "d": 8,
            "threads": 1,
        }
        values = {"is_bf16": 0, "bias": 0, "residual": 0, "eps": 1e-5, **given}
        with pytest.raises(TypeError, match=f"lacks the argument '{names[-1]}'"):
            native.kernels.norm(**{name: values[name] for name in names[:-1]})
        for _ in range(2):
            native.kernels.norm(**{name: values[name] for name in names})
        native.kernels.norm(**{"".join(name): values[name] for name in names})  # equal strings, others
        found.append(out)
    assert all(torch.equal(out, found[0]) for out in found)
    torch.testing.assert_close(found[0], torch.rms_norm(x, (8,), weight, 1e-5))


def test_a_call_without_adapters_makes_nothing_for_them() -> None:
    for adapted in (None, Adapted([], 3)):
        assert layer_runs(adapted, 5, {"up": (4, 4)}, torch.float32) is NO_RUNS
    assert NO_RUNS == (0, 0, 0, 0, ())


@compiled
def test_no_option_takes_the_place_of_another() -> None:
    """τ and ε in each other's place would give another layer, and cannot be passed without their names."""
    g = torch.Generator().manual_seed(0)
    arguments = routed_layer(g, torch.float32, 24, 40, 3, 9, tau=0.5, eps=0.25)
    x = random(g, torch.float32, 5, 24)
    swapped = {**arguments, "tau": 0.25, "eps": 0.5}
    for backend in BACKENDS:
        got, other = (backend.Ffn(**ffn_parts(**each))(x) for each in (arguments, swapped))
        torch.testing.assert_close(got, plain.Ffn(**ffn_parts(**arguments))(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, other, rtol=1e-3)
    options: Any = FfnOptions
    with pytest.raises(TypeError, match="positional"):
        options("gelu", 3, 0, 0.5, 0.25)
    experts: Any = MoeOptions
    with pytest.raises(TypeError, match="positional"):
        experts("gelu", 2, True)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_backends_are_called_in_one_way(backend: Backend) -> None:
    """Parameter names of every layer and operator are the protocol's, in its order."""
    for name, wanted in vars(Backend).items():
        if not name.startswith("_") and inspect.isfunction(wanted):
            offered = list(inspect.signature(getattr(backend, name)).parameters)
            assert offered == list(inspect.signature(wanted).parameters)[1:], name


def test_the_fallback_loads_without_native_kernels() -> None:
    check = "import sys, dsc_kernels.plain; print([m for m in sys.modules if 'native' in m and 'dsc' in m])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
