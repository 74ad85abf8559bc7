"""The page of a mixture: which experts, or adapters, a token picks is shown as atoms are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browsing import OpenTab, Visit
from support.running_server import RunningServer, start_server, stop_server
from support.small_models import small_config, wide_tensors

import dsc_serve
from dsc_serve.model.checkpoint import save_checkpoint
from dsc_serve.model.config import load_config

pytestmark = pytest.mark.full

TINY = Path(dsc_serve.__file__).parent / "models" / "dsc-tiny"
TOKENS = 6
DENSE_BETWEEN: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_kinds": [{"ffn": {"kind": "dense", "size": 28}}, {}],
    "layer_pattern": [0, 1],
}
MIXTURES = {"experts": ("moe", DENSE_BETWEEN, [1]), "adapters": ("molora", {}, [0, 1])}


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A small random mixture with the embedded model's tokenizer."""
    kind, changes, _ = MIXTURES[request.param]
    folder = tmp_path_factory.mktemp("page") / request.param
    vocabulary = load_config(TINY).vocab_size
    config = small_config(kind, vocab_size=vocabulary, max_position_embeddings=64, **changes)
    save_checkpoint(config, wide_tensors(config), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    server = start_server(str(folder), "--threads", "1")
    yield server
    assert stop_server(server) == 0


def test_the_view_speaks_of_what_the_model_picks(tab: OpenTab, mixture: RunningServer) -> None:
    card = mixture.get("/v1/models").json()["data"][0]
    many = card["picks"]["of"]
    assert card["dsc"] is None and card["picks"]["layers"] == MIXTURES[many][2]
    visit: Visit = tab(mixture.url)
    page = visit.page
    assert page.inner_text("#atoms-title") == many.capitalize()
    note = f"2 of {card['picks']['number']} {many} in each of {len(card['picks']['layers'])} layers"
    assert page.inner_text("#atoms-note") == note
    page.click("#tab-completion")
    for name, value in {"max_tokens": str(TOKENS), "temperature": "0"}.items():
        visit.field(name, value)
    page.fill("#prompt", "The city and the")
    page.press("#prompt", "Enter")
    visit.answered()
    visit.until("document.querySelector('#layers tr') && !cells.textContent.includes('#')")

    body = {"prompt": "The city and the", "max_tokens": TOKENS, "temperature": 0, "dsc": {"return_routing": True}}
    routing = mixture.post("/v1/completions", **body).json()["choices"][0]["dsc"]["routing"]
    assert routing.keys() == {"start", "token_ids", many, "gates", "signal"}
    assert page.locator(".cell").count() == len(routing["token_ids"])
    for at in (0, len(routing["token_ids"]) - 1):
        page.hover(f".cell:nth-child({at + 1})")
        rows = page.locator("#token tbody tr").all()
        assert [row.locator("th").inner_text() for row in rows] == [str(i) for i in card["picks"]["layers"]]
        for row, picked, gates in zip(rows, routing[many][at], routing["gates"][at], strict=True):
            chips = [text.split() for text in row.locator(".chip").all_inner_texts()]
            assert [int(number) for number, _ in chips] == picked
            assert [float(gate) for _, gate in chips] == pytest.approx(gates, abs=5.1e-4)
    heads = page.locator("#token th[scope=col]").all_inner_texts()
    assert heads == ["Layer", "Largest gate", f"{many.capitalize()}, with their gates"]
    layer = card["picks"]["layers"][0]
    label = page.locator("#token .chip").first.get_attribute("aria-label")
    assert label is not None and label.startswith(
        f"{many[:-1].capitalize()} {routing[many][at][0][0]} of layer {layer}"
    )
    assert many in str(page.get_attribute("#map", "aria-label"))
    options = page.locator("#shade option").all_inner_texts()
    assert options[0] == "mean largest gate" and options[1] == f"largest gate of layer {layer}"
