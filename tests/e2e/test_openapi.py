"""The OpenAPI document tells the truth: its examples run, and whatever is made from it is answered as it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.running_server import RunningServer, start_server, stop_server
from support.small_models import small_config, wide_tensors

from dsc_serve.config import resolve_model
from dsc_serve.model.checkpoint import save_checkpoint
from dsc_serve.model.config import load_config
from dsc_serve.server.openapi import EXAMPLES

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,missing_required_header,unsupported_method"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A random model of 64 positions with the embedded model's tokenizer: answers are short, and of every kind."""
    folder, embedded = tmp_path_factory.mktemp("openapi") / "small", resolve_model("dsc-tiny")
    config = small_config(vocab_size=load_config(embedded).vocab_size, max_position_embeddings=64, eos_token_id=0)
    save_checkpoint(config, wide_tensors(config), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, folder / name)
    server = start_server(str(folder), "--threads", "1")
    yield server
    assert stop_server(server) == 0


CASES = [(path, name) for path, examples in EXAMPLES.items() for name in examples]


@pytest.mark.parametrize(("path", "name"), CASES, ids=str)
def test_every_example_runs(tiny: RunningServer, path: str, name: str) -> None:
    document = tiny.get("/openapi.json").json()
    examples = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
    body = examples[name]["value"]
    answer = tiny.post(path, **body)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        events = answer.text.split("\n\n")
        if path == "/v1/responses":
            assert '"type":"response.incomplete"' in events[-2]
            return
        assert events[-2] == "data: [DONE]"
        assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_every_route_with_a_body_has_examples(tiny: RunningServer) -> None:
    paths = tiny.get("/openapi.json").json()["paths"]
    assert {path for path, item in paths.items() if "post" in item} == EXAMPLES.keys()


SHORT = pytest.param("examples,fuzzing", 40, 160, marks=pytest.mark.timeout(600))
LONG = pytest.param("examples,coverage,fuzzing", 2200, 10_000, marks=[pytest.mark.full, pytest.mark.timeout(3000)])


@pytest.mark.parametrize(("phases", "examples", "least"), [SHORT, LONG])
def test_nothing_made_from_the_document_breaks_the_server_or_the_document(
    small: RunningServer, phases: str, examples: int, least: int, tmp_path: Path
) -> None:
    before = len(small.log)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{small.url}/openapi.json"),
            *("--phases", phases, "--max-examples", str(examples), "--seed", "1", "--checks", CHECKS),
            # Without a key, whatever is asked of an administrator's route is answered with 401, other methods too.
            *("--exclude-path-regex", "^/admin/", "--suppress-health-check", "all", "--warnings", "off"),
            *("--no-shrink", "--request-timeout", "180", "--workers", "2", "--no-color"),
            *("--generation-database", "none", "--max-failures", "20"),
        ],
        capture_output=True,
        text=True,
        timeout=2900,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    count = re.search(r"([0-9,]+) generated", result.stdout)
    assert count is not None, result.stdout[-2000:]
    assert int(count[1].replace(",", "")) >= least
    small.wait_until(small.idle)
    assert small.metric("dsc_serve_permits_held") == 0
    assert small.metric("dsc_serve_invariant_repairs_total") == 0
    assert not [line for line in small.log[before:] if "Traceback" in line or '"level": "error"' in line.lower()]
