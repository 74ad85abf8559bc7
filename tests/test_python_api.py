"""docs/python-api.md against the code: names, defaults, signatures and errors are these, and its examples run."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import dsc_serve
from dsc_serve import LLM, RequestOutput, SamplingParams, StructuredOutputs

PAGE = (Path(__file__).parents[1] / "docs" / "python-api.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found.group(1)


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without their backquotes."""
    lines = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def bare(function: Any) -> str:
    """A signature without self and annotations."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for name, p in signature.parameters.items() if name != "self"]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def test_the_parameters_of_llm_are_listed_with_their_defaults() -> None:
    parameters = inspect.signature(LLM).parameters
    assert [row[:2] for row in rows("`LLM`")] == [[name, repr(p.default)] for name, p in parameters.items()]
    assert [p.kind is p.KEYWORD_ONLY for p in parameters.values()] == [False] * 3 + [True] * (len(parameters) - 3)


def test_every_public_method_of_llm_stands_there_with_its_signature() -> None:
    told = dict(re.findall(r"^- `LLM\.(\w+)(\(.*?\))?`", section("`LLM`"), re.MULTILINE))
    public = {name: member for name, member in vars(LLM).items() if not name.startswith("_") and callable(member)}
    assert {name: bare(member) for name, member in public.items()} == {n: t for n, t in told.items() if t}


def test_the_fields_of_an_output_are_all_there() -> None:
    assert [row[0] for row in rows("`RequestOutput`")] == [field.name for field in dataclasses.fields(RequestOutput)]


def test_sampling_parameters_are_listed_with_their_defaults_and_bounds() -> None:
    fields = [
        [field.name, repr(getattr(SamplingParams(), field.name))] for field in msgspec.structs.fields(SamplingParams)
    ]
    listed = rows("`SamplingParams`")
    assert [row[:2] for row in listed] == fields
    for name, _, allowed, _ in listed:
        if bounds := re.fullmatch(r"(-?\d+) to (\d+)", allowed):
            for bound, beyond in zip(map(int, bounds.groups()), (-1, 1), strict=True):
                SamplingParams(**{name: bound})
                with pytest.raises(dsc_serve.ParameterError, match=f"{name} is"):
                    SamplingParams(**{name: bound + beyond})


def test_structured_outputs_are_all_named() -> None:
    named = set(
        re.findall(r"`(\w+)`", section("`SamplingParams`").split("`StructuredOutputs` takes")[1].split("```")[0])
    )
    assert {field.name for field in msgspec.structs.fields(StructuredOutputs)} == named


def test_errors_are_what_the_page_calls_them() -> None:
    listed = rows("What they raise")
    assert {name for name in dsc_serve.__all__ if name.endswith("Error")} == {row[0] for row in listed}
    for name, parent, _ in listed:
        assert getattr(dsc_serve, name).__base__.__name__ == parent, name


def test_all_that_is_offered_is_told_of_and_there() -> None:
    for name in set(dsc_serve.__all__) - {"__version__"}:
        assert f"`{name}`" in PAGE and getattr(dsc_serve, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'LLMs'"):
        dsc_serve.LLMs  # noqa: B018


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, dsc_serve; dsc_serve.SamplingParams; dsc_serve.ParameterError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "python-api.md", "exec"), names)
    streamed = capsys.readouterr().out
    (whole,) = (output.text for output in names["outputs"][:1])
    assert streamed and whole and names["logits"].shape[0] == 3 and names["losses"].shape == (2,)
