"""Adapters over HTTP: how requests name them, who may, and where their names are told."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from fastapi import FastAPI
from support.access import ALICE, BOB, ROOT, Write, bearer, entry
from support.fake_engine import FakeEngine
from support.serving import app_around, ask, chat, client_of, complete, events_of

from dsc_serve.adapter_choice import AdapterChoice, AdapterInfo
from dsc_serve.config import ConfigError, LogConfig
from dsc_serve.server.keys import KeyRing
from dsc_serve.server.metrics.adapters import MOST_ADAPTERS, OTHER
from dsc_serve.text.tokenizer import Tokenizer
from dsc_serve.worker.messages import Delta

LAW = AdapterInfo(name="law", digest="ab" * 32, kind="lora", rank=8, modules=210, nbytes=4096, loaded=True)
ODE = AdapterInfo(name="ode")
BROKEN = AdapterInfo(name="broken", error="adapter_config.json: use_dora is True: DoRA rescales the base's columns")
TWO = {"law": 0.5, "ode": -1}


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.adapter_infos = [LAW, ODE, BROKEN]
    return engine


def error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    told: dict[str, Any] = response.json()["error"]
    return told


@pytest.mark.parametrize(
    ("model", "choice"),
    [
        (None, None),
        ("fake", None),
        ("law", AdapterChoice.of("law")),
        ("fake:law", AdapterChoice.of("law")),
        ("ode", AdapterChoice.of("ode")),
    ],
)
def test_the_model_of_a_request_names_the_adapter(
    model: str | None, choice: AdapterChoice | None, app: FastAPI, engine: FakeEngine
) -> None:
    for response in (complete(app, model=model, max_tokens=2), chat(app, model=model, max_tokens=2)):
        assert response.status_code == 200, response.text
        assert response.json()["model"] == (model or "fake")
    assert engine.adapters_asked == [choice, choice]
    (first, *_) = events_of(complete(app, model=model, max_tokens=2, stream=True))
    assert first["model"] == (model or "fake")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 16}),
        ("/v1/embeddings", {"input": "hi"}),
        ("/v1/dsc/trace", {"prompt": "hi"}),
    ],
)
def test_every_endpoint_of_the_engine_takes_adapters(
    path: str, body: dict[str, Any], app: FastAPI, engine: FakeEngine
) -> None:
    one = ask(app, "POST", path, json={**body, "model": "law"})
    assert (one.status_code, one.json()["model"]) == (200, "law")
    assert error(ask(app, "POST", path, json={**body, "model": "lore"}), 404)["param"] == "model"
    assert error(ask(app, "POST", path, json={**body, "model": "broken"}), 404)["code"] == "adapter_broken"
    assert engine.adapters_asked == [AdapterChoice.of("law")]
    if path != "/v1/responses":
        both = ask(app, "POST", path, json={**body, "dsc": {"adapters": TWO}})
        assert (both.status_code, both.json()["model"]) == (200, "0.5*law+-1*ode")
        assert engine.adapters_asked[1] == AdapterChoice((("law", 0.5), ("ode", -1.0)))


def test_texts_become_tokens_for_an_adapter_too(app: FastAPI) -> None:
    assert ask(app, "POST", "/tokenize", json={"prompt": "hi", "model": "law"}).status_code == 200
    assert error(ask(app, "POST", "/detokenize", json={"tokens": [97], "model": "lore"}), 404)["param"] == "model"


@pytest.mark.parametrize(
    "name", ["lore", "fake:lore", "fake:fake", "law:fake", "../law", "", "LAW", "law ", "other:law"]
)
def test_a_name_that_is_not_known_is_never_the_base(name: str, app: FastAPI, engine: FakeEngine) -> None:
    told = error(complete(app, model=name), 404)
    assert (told["param"], told["code"]) == ("model", "model_not_found")
    assert '"fake", "broken", "law", "ode"' in told["message"]
    assert not engine.submitted


def test_a_broken_adapter_is_told_with_its_reason(app: FastAPI, engine: FakeEngine) -> None:
    for asked in ({"model": "broken"}, {"model": "fake:broken"}, {"dsc": {"adapters": {"broken": 1}}}):
        told = error(complete(app, **asked), 404)
        assert told["code"] == "adapter_broken"
        assert "use_dora is True: DoRA" in told["message"]
    assert not engine.submitted


def test_one_that_breaks_meanwhile_is_told_alike(app: FastAPI, engine: FakeEngine) -> None:
    engine.fail_after, engine.error = 0, Delta("", [], "error", error="its file has gone", error_field="adapter")
    told = error(complete(app, model="law"), 404)
    assert (told["code"], told["param"]) == ("adapter_broken", "model")
    assert "its file has gone" in told["message"]


def test_one_that_goes_meanwhile_is_told_as_one_that_never_was(app: FastAPI, engine: FakeEngine) -> None:
    engine.fail_after = 0
    engine.error = Delta("", [], "error", error="adapter 'law' is not known", error_field="adapter", unknown=True)
    told = error(complete(app, model="law"), 404)
    assert (told["code"], told["param"]) == ("model_not_found", "model")
    odd = "adapter 'law' cannot be used: its base is not known"  # whatever a reason says
    engine.error = Delta("", [], "error", error=odd, error_field="adapter")
    assert error(complete(app, model="law"), 404)["code"] == "adapter_broken"


def test_an_accident_is_nobodys_fault(app: FastAPI, engine: FakeEngine) -> None:
    engine.fail_after = 0
    engine.error = Delta("", [], "error", error="adapter 'law' could not be loaded: MemoryError", unavailable=True)
    error(complete(app, model="law"), 503)


def test_what_cannot_be_composed_is_the_requests_fault(app: FastAPI, engine: FakeEngine) -> None:
    said = "adapter 'law+ode' cannot be used: q of layer 0 has ranks [4, 8]; a product of sums needs one"
    engine.fail_after, engine.error = 0, Delta("", [], "error", error=said, error_field="adapter")
    told = error(complete(app, dsc={"adapters": TWO, "composition": "product_of_sums"}), 400)
    assert told["param"] == "dsc.adapters" and "has ranks [4, 8]" in told["message"]


def test_many_first_requests_at_a_time_all_find_their_adapter(app: FastAPI, engine: FakeEngine) -> None:
    slow = engine.adapters

    async def adapters(timeout_s: float = 1.0) -> list[AdapterInfo]:
        await asyncio.sleep(0.05)
        return await slow(timeout_s)

    engine.adapters = adapters  # type: ignore[method-assign]

    async def ask_all() -> list[int]:
        async with client_of(app) as client:
            body = {"prompt": "hi", "model": "law", "max_tokens": 1}
            asked = [client.post("/v1/completions", json=body) for _ in range(5)]
            return [response.status_code for response in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [200] * 5


def test_an_engine_that_never_told_is_not_taken_for_one_without_adapters(app: FastAPI, engine: FakeEngine) -> None:
    engine.alive = False
    assert error(complete(app, model="law"), 503)["code"] == "engine_down"
    assert error(ask(app, "GET", "/v1/models/law"), 503)["code"] == "engine_down"


def test_several_with_weights(app: FastAPI, engine: FakeEngine) -> None:
    for composition, form in ((None, "sum"), ("sum", "sum"), ("product_of_sums", "product of sums")):
        response = complete(app, max_tokens=1, dsc={"adapters": TWO, "composition": composition})
        assert response.status_code == 200, response.text
        assert engine.adapters_asked[-1] == AdapterChoice((("law", 0.5), ("ode", -1.0)), form)  # type: ignore[arg-type]
    complete(app, max_tokens=1, model="fake", dsc={"adapters": {"law": 1}})
    assert engine.adapters_asked[-1] == AdapterChoice.of("law")


@pytest.mark.parametrize(
    ("dsc", "status", "told"),
    [
        ({"adapters": {}}, 400, "dsc.adapters"),
        ({"adapters": []}, 400, "dsc.adapters is a list"),
        ({"adapters": {"law": "1"}}, 400, "dsc.adapters.law"),
        ({"adapters": {"law": True}}, 400, "dsc.adapters.law"),
        ({"adapters": {"law": 1e9}}, 400, "is 1000000000"),
        ({"adapters": {f"a{i}": 1 for i in range(17)}}, 400, "dsc.adapters"),
        ({"adapters": {"law": 1}, "composition": "mean"}, 400, "dsc.composition"),
        ({"composition": "sum"}, 400, "dsc.composition is set; it may only be with dsc.adapters"),
        ({"adapters": {"law": 1, "lore": 1}}, 404, '"lore" is not served here'),
    ],
)
def test_what_weights_may_be(dsc: dict[str, Any], status: int, told: str, app: FastAPI, engine: FakeEngine) -> None:
    assert told in error(complete(app, dsc=dsc), status)["message"]
    assert not engine.submitted


def test_weights_and_an_adapter_as_the_model_contradict_each_other(app: FastAPI) -> None:
    told = error(complete(app, model="law", dsc={"adapters": {"ode": 1}}), 400)
    assert told["param"] == "dsc.adapters"


def test_the_list_of_models_tells_all_of_them(app: FastAPI) -> None:
    base, broken, law, ode = ask(app, "GET", "/v1/models").json()["data"]
    assert (base["id"], base["parent"], base["adapter"]) == ("fake", None, None)
    assert (law["id"], law["parent"], law["root"]) == ("law", "fake", "ab" * 32)
    assert law["adapter"] == {
        "kind": "lora",
        "rank": 8,
        "modules": 210,
        "bytes": 4096,
        "basis": None,
        "loaded": True,
        "error": None,
    }
    assert (ode["root"], ode["adapter"]["kind"], ode["adapter"]["loaded"]) == (None, None, False)
    assert broken["adapter"]["error"] == BROKEN.error
    assert ask(app, "GET", "/v1/models/law").json() == law
    assert ask(app, "GET", "/v1/models/fake:law").json() == {**law, "id": "fake:law"}
    assert ask(app, "GET", "/v1/models/broken").json() == broken
    assert error(ask(app, "GET", "/v1/models/lore"), 404)["code"] == "model_not_found"


def test_adapters_that_come_are_found_and_such_that_go_are_not(app: FastAPI, engine: FakeEngine) -> None:
    catalogue = app.state.service.catalogue
    complete(app, model="law", max_tokens=1)
    engine.adapter_infos = [AdapterInfo(name="new")]
    catalogue._looked = float("-inf")
    assert complete(app, model="new", max_tokens=1).status_code == 200
    assert error(complete(app, model="law"), 404)["code"] == "model_not_found"


def test_an_engine_that_does_not_answer_leaves_the_list_as_it_was(app: FastAPI, engine: FakeEngine) -> None:
    ask(app, "GET", "/v1/models")
    engine.alive = False
    app.state.service.catalogue._looked = float("-inf")
    assert len(ask(app, "GET", "/v1/models").json()["data"]) == 4


def test_no_adapter_takes_the_bases_name(app: FastAPI, engine: FakeEngine) -> None:
    engine.adapter_infos = [AdapterInfo(name="fake")]
    complete(app, model="fake", max_tokens=1)
    complete(app, model="fake:fake", max_tokens=1)
    assert engine.adapters_asked == [None, AdapterChoice.of("fake")]


@pytest.fixture
def bound(engine: FakeEngine, tokenizer: Tokenizer, write: Write) -> FastAPI:
    """An app with Alice's key, bound to one adapter, Bob's to the base and another, and one that is bound to none."""
    text = entry("alice", ALICE) + 'adapters = ["law"]\n' + entry("bob", BOB) + 'adapters = ["ode", "fake"]\n'
    return app_around(engine, tokenizer, KeyRing(write(text + entry("root", ROOT)), ""))


def names(app: FastAPI, key: str) -> list[str]:
    return [card["id"] for card in ask(app, "GET", "/v1/models", headers=bearer(key)).json()["data"]]


def posted(app: FastAPI, key: str, **fields: Any) -> Any:
    return ask(app, "POST", "/v1/completions", json={"prompt": "hi", "max_tokens": 1, **fields}, headers=bearer(key))


def test_keys_see_the_adapters_that_they_are_bound_to_and_no_others(bound: FastAPI) -> None:
    assert names(bound, ALICE) == ["law"]
    assert names(bound, BOB) == ["fake", "ode"]
    assert names(bound, ROOT) == ["fake", "broken", "law", "ode"]
    assert ask(bound, "GET", "/v1/models/law", headers=bearer(BOB)).status_code == 404
    assert ask(bound, "GET", "/v1/models/fake", headers=bearer(ALICE)).status_code == 404


def test_keys_use_the_adapters_that_they_are_bound_to_and_no_others(bound: FastAPI, engine: FakeEngine) -> None:
    assert posted(bound, ALICE, model="law").status_code == 200
    assert posted(bound, ALICE, model="fake:law").status_code == 200
    unknown = error(posted(bound, ALICE, model="nothing"), 404)
    for name in ("ode", "fake:ode", "broken", "fake"):
        told = error(posted(bound, ALICE, model=name), 404)
        assert told["message"] == unknown["message"].replace("nothing", name)  # as if there were none
        assert "ode" not in told["message"].replace(name, "").replace("model", "")
    assert error(posted(bound, ALICE, dsc={"adapters": TWO}), 404)["code"] == "model_not_found"
    assert posted(bound, ALICE, dsc={"adapters": {"law": 0.5}}).status_code == 200
    assert len(engine.submitted) == 3


def test_a_bound_key_that_names_no_model_gets_its_own(bound: FastAPI, engine: FakeEngine) -> None:
    assert posted(bound, ALICE).json()["model"] == "law"
    assert posted(bound, BOB).json()["model"] == "fake"
    assert engine.adapters_asked == [AdapterChoice.of("law"), None]


@pytest.mark.parametrize("value", ["[]", '[""]', '"law"', "[1]"])
def test_what_a_key_may_be_bound_to(value: str, write: Write) -> None:
    with pytest.raises(ConfigError, match="adapters"):
        KeyRing(write(entry("alice", ALICE) + f"adapters = {value}\n"), "")


def test_metrics_count_by_adapter(app: FastAPI, engine: FakeEngine) -> None:
    complete(app, max_tokens=3)
    complete(app, model="law", max_tokens=3)
    complete(app, model="fake:law", max_tokens=2)
    complete(app, dsc={"adapters": TWO}, max_tokens=1)
    complete(app, model="lore")
    lines = ask(app, "GET", "/metrics").text.splitlines()
    for line in (
        'dsc_serve_adapter_generations_total{adapter="(base)"} 1.0',
        'dsc_serve_adapter_generations_total{adapter="law"} 2.0',
        'dsc_serve_adapter_prompt_tokens_total{adapter="law"} 4.0',
        'dsc_serve_adapter_generated_tokens_total{adapter="law"} 5.0',
        'dsc_serve_adapter_generated_tokens_total{adapter="(composition)"} 1.0',
        'dsc_serve_adapters{state="loaded"} 1.0',
        'dsc_serve_adapters{state="on disk"} 1.0',
        'dsc_serve_adapters{state="broken"} 1.0',
    ):
        assert line in lines
    assert not any("lore" in line or 'adapter="fake' in line for line in lines)


def test_series_of_adapters_are_bounded(app: FastAPI) -> None:
    metrics = app.state.service.metrics
    for i in range(MOST_ADAPTERS + 50):
        metrics.generation_ended("stop", 1, 1, None, adapter=f"tenant-{i}")
    lines = ask(app, "GET", "/metrics").text.splitlines()
    own = [line for line in lines if line.startswith("dsc_serve_adapter_generations_total{")]
    assert len(own) == 1 + MOST_ADAPTERS + 1  # the base's, their own, and that of all others
    assert f'dsc_serve_adapter_generations_total{{adapter="{OTHER}"}} 50.0' in own


def test_series_are_there_before_anybody_uses_an_adapter(tokenizer: Tokenizer) -> None:
    lines = ask(app_around(FakeEngine(), tokenizer), "GET", "/metrics").text.splitlines()
    assert 'dsc_serve_adapter_generations_total{adapter="(base)"} 0.0' in lines
    assert 'dsc_serve_adapters{state="loaded"} 0.0' in lines


def test_logs_name_the_adapter(engine: FakeEngine, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    app = app_around(engine, tokenizer, log=LogConfig(log_requests=True))
    caplog.set_level(logging.INFO)
    complete(app, model="fake:law", max_tokens=1)
    facts = [record.facts for record in caplog.records if hasattr(record, "facts") and "adapter" in record.facts]
    assert facts[-1]["adapter"] == "law"
    engine.fail_after = 0
    complete(app, model="law")
    assert "(user None, adapter 'law') failed" in caplog.text
