"""What crosses into C++ and between backends has names on both sides, from one table each."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
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
from dsc_kernels.weights import FfnOptions, MoeOptions

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
