"""Keyboards, screen readers, phones, dark rooms; and the pictures of the documentation.

`PAGE_PICTURES=docs/images .venv/bin/pytest tests/page/test_page_looks.py` writes the pictures there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.browsing import OpenTab, Serve, Visit
from support.fake_engine import FakeEngine, saying
from support.running_server import RunningServer

pytestmark = pytest.mark.full

VIEWS = ("chat", "completion", "live")
PHONE = {"width": 360, "height": 740}
MOST_BYTES = 200_000
# Of every text that is seen: its contrast with what is behind it, as WCAG 2 counts it.
CONTRASTS = """() => {
    const shade = (part) => ((part /= 255) <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    const light = ([r, g, b]) => 0.2126 * shade(r) + 0.7152 * shade(g) + 0.0722 * shade(b);
    const canvas = new OffscreenCanvas(1, 1).getContext('2d');
    const painted = (colors) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const told = [];
    for (const element of document.querySelectorAll('body *')) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!own || !element.checkVisibility() || element.matches(':disabled, option, script, noscript')) continue;
        const behind = [];
        for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
        const [ground, text] = [painted(behind), painted([...behind, getComputedStyle(element).color])].map(light);
        told.push([(Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05), element.outerHTML.slice(0, 80)]);
    }
    return told;
}"""
UNNAMED = """() => [...document.querySelectorAll('button, input, select, textarea, summary, [role], svg, canvas')]
    .filter((one) => one.checkVisibility())
    .filter((one) => !(one.ariaLabel || one.labels?.length || one.getAttribute('aria-labelledby')
        || one.textContent.trim() || ['alert', 'status'].includes(one.role)))
    .map((one) => one.outerHTML)"""


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[Visit, str], None]:
    """Keeps a picture of what a tab shows; it must be small, and of something."""

    def keep(visit: Visit, name: str) -> None:
        folder = Path(os.environ.get("PAGE_PICTURES", tmp_path))
        file = folder / f"page-{name}.png"
        folder.mkdir(exist_ok=True)
        visit.page.screenshot(path=file)
        assert 15_000 < file.stat().st_size < MOST_BYTES

    return keep


def conversation(visit: Visit) -> None:
    for field, value in {"max_tokens": "48", "seed": "11", "temperature": "0.7"}.items():
        visit.field(field, value)
    visit.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = false; })")
    visit.chat("The city and the cities of the north")
    visit.answered()
    visit.until("document.querySelector('#layers tr') && !cells.textContent.includes('#')")
    best = """[...cells.children].map((cell, i) => {
        cell.dispatchEvent(new MouseEvent('mouseenter'));
        return [document.querySelectorAll('.lit').length, i];
    }).sort((a, b) => b[0] - a[0])[0][1]"""
    visit.page.hover(f".cell:nth-child({visit.run(best) + 1})")


@contextmanager
def load(server: RunningServer, streams: int) -> Iterator[None]:
    stop = threading.Event()

    def ask(number: int) -> None:
        prompts = ("Once upon a time", "The President of the", "In Python, a list", "The city of")
        while not stop.is_set():
            server.post("/v1/completions", prompt=prompts[number % 4] * 6, max_tokens=40 + 20 * number, ignore_eos=True)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_conversation_with_its_atoms(
    tab: OpenTab, tiny: RunningServer, picture: Callable[[Visit, str], None], scheme: str
) -> None:
    visit = tab(tiny.url, color_scheme=scheme)
    conversation(visit)
    picture(visit, "atoms" if scheme == "light" else "dark")
    ground = visit.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(ground) < 60) is (scheme == "dark") and (min(ground) > 200) is (scheme == "light")
    assert_readable(visit)


@pytest.mark.timeout(400)
def test_the_live_view_under_load(tab: OpenTab, tiny: RunningServer, picture: Callable[[Visit, str], None]) -> None:
    visit = tab(tiny.url, viewport={"width": 1280, "height": 800})
    visit.page.click("#tab-live")
    seconds = 100 if "PAGE_PICTURES" in os.environ else 6  # a picture wants some past
    for streams, share in ((2, 0.3), (8, 0.4), (4, 0.3)):
        with load(tiny, streams):
            visit.page.wait_for_timeout(1000 * seconds * share)
            if streams == 4:
                picture(visit, "live")
    assert_readable(visit)


def test_a_phone_s_width(tab: OpenTab, tiny: RunningServer, picture: Callable[[Visit, str], None]) -> None:
    visit = tab(tiny.url, viewport=PHONE, device_scale_factor=2, has_touch=True, is_mobile=True)
    conversation(visit)
    for view in VIEWS:
        visit.page.click(f"#tab-{view}")
        visit.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert visit.run("document.documentElement.scrollWidth") <= PHONE["width"], view
        visit.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = false; })")
    visit.page.click("#tab-chat")
    visit.page.evaluate("document.getElementById('atoms').scrollIntoView(); scrollBy(0, -250)")
    picture(visit, "phone")


def assert_readable(visit: Visit) -> None:
    """WCAG AA: 4.5 to 1, for each text that is seen."""
    visit.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    contrasts = visit.run(CONTRASTS)
    assert len(contrasts) > 15
    assert [(round(ratio, 2), text) for ratio, text in contrasts if ratio < 4.5] == []


@pytest.mark.parametrize("view", VIEWS)
def test_every_control_has_a_name_and_every_id_is_one(tab: OpenTab, tiny: RunningServer, view: str) -> None:
    visit = tab(tiny.url)
    visit.chat("Once")
    visit.answered()
    visit.page.click(f"#tab-{view}")
    visit.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    visit.page.wait_for_timeout(300)
    assert visit.run(UNNAMED) == []
    ids = visit.run("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids)) > 30
    named = "[...document.querySelectorAll('[for], [aria-controls], [aria-labelledby]')].flatMap((one) => "
    named += "['for', 'aria-controls', 'aria-labelledby'].map((name) => one.getAttribute(name)).filter(Boolean))"
    assert set(visit.run(named)) <= set(ids)
    tree = visit.page.locator("body").aria_snapshot()
    assert f'tab "{view.capitalize()}" [selected]' in tree and f'tabpanel "{view.capitalize()}"' in tree


def test_all_of_it_works_by_keyboard_alone(tab: OpenTab, scripted: Serve) -> None:
    engine = FakeEngine(saying("by hand"))
    visit = tab(scripted(engine))
    keyboard = visit.page.keyboard

    def focused() -> Any:
        return visit.run(
            "document.activeElement.id || document.activeElement.className || document.activeElement.textContent"
        )

    keyboard.press("Tab")
    assert focused() == "tab-chat"
    for key, place in (
        ("ArrowRight", "completion"),
        ("ArrowRight", "live"),
        ("ArrowRight", "chat"),
        ("ArrowLeft", "live"),
    ):
        keyboard.press(key)
        assert focused() == f"tab-{place}" and visit.page.is_visible(f"#view-{place}")
    keyboard.press("ArrowRight")
    order = []
    for _ in range(14):
        keyboard.press("Tab")
        order.append(focused())
        if order[-1] == "message":
            keyboard.type("hi")
            keyboard.press("Shift+Enter")
            keyboard.type("there")
    assert order[:6] == ["model", "key", "conversation", "message", "send", "new-chat"], "what is off is no stop"
    outline = visit.run("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "what has the focus is seen to have it"
    visit.page.focus("#message")
    keyboard.press("Enter")
    assert visit.answered() == "by hand"
    assert bytes(engine.submitted[0][1]) == b"<user>hi\nthere"


def test_an_answer_is_read_out_when_it_is_whole_and_an_error_at_once(tab: OpenTab, scripted: Serve) -> None:
    engine = FakeEngine(delay_s=0.1)
    visit = tab(scripted(engine), expected="400")
    visit.field("max_tokens", "8")
    visit.chat("x")
    visit.until("conversation.getAttribute('aria-busy') === 'true'")
    visit.answered()
    assert visit.page.get_attribute("#conversation", "aria-busy") is None
    assert visit.page.get_attribute("#conversation", "role") == "log"
    assert visit.page.get_attribute("#notice", "role") == "alert"
