"""A real server with a folder of adapters: each request gets its own, whoever is computed beside it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.random_adapters import adapter_of, merged_model, random_adapters
from support.running_server import RunningServer, start_server, stop_server

from dsc_serve import LLM, SamplingParams

PROMPTS = ["Once upon a time", "The King said to the people", "In the beginning", "The city of Rome is"]
TOKENS = 24
NAMES = ("law", "ode", "tax")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    random_adapters(folder, *NAMES)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    server = start_server("--adapters", str(folder), "--dtype", "float32")
    yield server
    assert stop_server(server) == 0


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By what is asked for, the greedy texts of models that have it in their weights."""
    adapters = {name: adapter_of(folder / name) for name in NAMES}
    asked: dict[str, list[tuple[Any, float]]] = {name: [(own, 1.0)] for name, own in adapters.items()}
    asked |= {"dsc-tiny": [], "sum": [(adapters["law"], 0.5), (adapters["ode"], -0.75)]}
    found = {}
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for name, weighted in asked.items():
        model = merged_model(tmp_path_factory.mktemp("merged") / "model", *weighted)
        with LLM(str(model), dtype="float32", threads=1) as llm:
            found[name] = [output.text for output in llm.generate(PROMPTS, params)]
    assert len({tuple(texts) for texts in found.values()}) == len(found)
    return found


def text(server: RunningServer, prompt: str, **fields: Any) -> str:
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **fields}
    response = server.post("/v1/completions", **body)
    assert response.status_code == 200, response.text
    told: str = response.json()["choices"][0]["text"]
    return told


SUM = {"adapters": {"law": 0.5, "ode": -0.75}}


def fields(name: str) -> dict[str, Any]:
    return {"dsc": SUM} if name == "sum" else {"model": name}


def test_each_request_gets_its_own_adapter_alone(server: RunningServer, expected: dict[str, list[str]]) -> None:
    for name, texts in expected.items():
        assert text(server, PROMPTS[0], **fields(name)) == texts[0], name


def test_each_request_gets_its_own_adapter_beside_others(server: RunningServer, expected: dict[str, list[str]]) -> None:
    """The same prompts with all adapters, sums and the base at a time, twice: then their prefixes are known."""
    asked = [(name, i) for i in range(len(PROMPTS)) for name in expected] * 2
    with ThreadPoolExecutor(len(expected) * len(PROMPTS)) as pool:
        found = list(pool.map(lambda one: text(server, PROMPTS[one[1]], **fields(one[0])), asked))
    for (name, i), told in zip(asked, found, strict=True):
        assert told == expected[name][i], (name, i)


def test_the_list_of_models_has_them(server: RunningServer) -> None:
    server.wait_until(lambda: all(card["adapter"]["rank"] for card in adapters(server) if card["id"] != "broken"))
    cards = {card["id"]: card for card in adapters(server)}
    assert sorted(cards) == ["broken", *NAMES]
    assert cards["law"]["parent"] == "dsc-tiny"
    assert cards["law"]["root"] != cards["ode"]["root"]
    assert (cards["law"]["adapter"]["kind"], cards["law"]["adapter"]["rank"]) == ("lora", 4)
    assert "use_dora is True" in cards["broken"]["adapter"]["error"]


def adapters(server: RunningServer) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = server.get("/v1/models").json()["data"]
    return [card for card in data if card["parent"]]


def test_the_unknown_and_the_broken_are_404(server: RunningServer) -> None:
    for name, code, told in (("lore", "model_not_found", "lore"), ("broken", "adapter_broken", "use_dora is True")):
        response = server.post("/v1/completions", prompt="hi", model=name, max_tokens=1)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == code
        assert told in response.json()["error"]["message"]


def test_a_product_of_sums_is_computed(server: RunningServer, expected: dict[str, list[str]]) -> None:
    both = {**SUM, "composition": "product_of_sums"}
    told = text(server, PROMPTS[0], dsc=both)
    assert told not in (expected["sum"][0], expected["dsc-tiny"][0])
    one = {"adapters": {"law": 1}, "composition": "product_of_sums"}
    assert text(server, PROMPTS[0], dsc=one) == expected["law"][0]


def test_embeddings_are_the_adapters(server: RunningServer) -> None:
    vectors = [
        server.post("/v1/embeddings", input="hi", model=name).json()["data"][0]["embedding"]
        for name in ("dsc-tiny", "law", "ode", "law")
    ]
    assert vectors[1] == vectors[3]
    assert vectors[0] != vectors[1] != vectors[2]


def test_adapters_come_change_and_go_while_the_server_runs(
    server: RunningServer, folder: Path, expected: dict[str, list[str]]
) -> None:
    def asked(name: str) -> str | None:
        response = server.post(
            "/v1/completions", prompt=PROMPTS[0], model=name, max_tokens=TOKENS, temperature=0, ignore_eos=True
        )
        return response.json()["choices"][0]["text"] if response.status_code == 200 else None

    def until(name: str, wanted: str | None) -> None:
        server.wait_until(lambda: (time.sleep(0.2), asked(name) == wanted)[1])

    assert asked("new") is None
    copied(folder / "law", folder / "new")
    until("new", expected["law"][0])
    assert text(server, PROMPTS[0], model="new") == expected["law"][0]  # with what is cached
    copied(folder / "ode", folder / "new")
    until("new", expected["ode"][0])
    shutil.rmtree(folder / "new")
    until("new", None)
    assert asked("ode") == expected["ode"][0]


def copied(source: Path, target: Path) -> None:
    """As by somebody who is careful: written beside, and then put in its place."""
    made = target.with_name(f".{target.name}.new")
    shutil.copytree(source, made, copy_function=shutil.copyfile)
    if target.exists():
        target.rename(old := target.with_name(f".{target.name}.old"))
        made.rename(target)
        shutil.rmtree(old)
    else:
        made.rename(target)


def test_adapters_are_back_after_a_restart_of_the_engine(server: RunningServer, expected: dict[str, list[str]]) -> None:
    restarts = server.metric("dsc_serve_engine_restarts_total")
    os.kill(server.engine_pid, signal.SIGKILL)
    server.wait_until(lambda: server.metric("dsc_serve_engine_restarts_total") > restarts, 180)
    server.wait_until(lambda: server.get("/health/ready").status_code == 200, 180)
    assert text(server, PROMPTS[0], model="law") == expected["law"][0]


def test_metrics_tell_who_asked(server: RunningServer) -> None:
    before = server.metric('dsc_serve_adapter_generated_tokens_total{adapter="tax"}')
    text(server, PROMPTS[0], model="dsc-tiny:tax")
    assert server.metric('dsc_serve_adapter_generated_tokens_total{adapter="tax"}') == before + TOKENS
