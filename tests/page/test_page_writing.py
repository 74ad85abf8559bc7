"""Chats and completions on the page: streams, stops, errors, keys, tools, forms of answers, and the code of it all."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
from support.browsing import KEY, OpenTab, Serve
from support.fake_engine import FakeEngine, saying
from support.running_server import RunningServer

pytestmark = pytest.mark.full

MARKUP = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script>&lt;b&gt;"


def until(condition: Any, limit_s: float = 10) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_answer_is_shown_as_it_comes(tab: OpenTab, scripted: Serve) -> None:
    engine = FakeEngine(saying("one two three four five six"), delay_s=0.03)
    visit = tab(scripted(engine))
    visit.run("""() => {
        window.seen = [];
        new MutationObserver(() => {
            const text = document.querySelector('.assistant .text')?.textContent;
            if (text && text !== seen.at(-1)) seen.push(text);
        }).observe(conversation, { subtree: true, childList: true, characterData: true });
    }""")
    visit.chat("count")
    assert visit.answered() == "one two three four five six"
    seen = visit.run("seen")
    assert len(seen) > 10 and all(b.startswith(a) for a, b in itertools.pairwise(seen))
    facts = visit.page.inner_text(".assistant .facts")
    assert "+ 27 tokens" in facts and "first after" in facts and facts.endswith("stop")


def test_a_conversation_goes_on_with_all_that_was_said(tab: OpenTab, scripted: Serve) -> None:
    engine = FakeEngine(saying("yes"))
    visit = tab(scripted(engine))
    visit.field("system", "Be brief.")
    for text in ("first", "second"):
        visit.chat(text)
        assert visit.answered() == "yes"
    assert bytes(engine.submitted[-1][1]) == b"<system>Be brief.<user>first<assistant>yes<user>second"
    visit.page.click("#new-chat")
    assert visit.page.inner_text("#conversation") == ""
    visit.chat("third")
    visit.answered()
    assert bytes(engine.submitted[-1][1]) == b"<system>Be brief.<user>third"


@pytest.mark.parametrize("view", ["chat", "completion"])
def test_a_stop_ends_the_generation_and_keeps_what_came(tab: OpenTab, scripted: Serve, view: str) -> None:
    engine = FakeEngine(delay_s=0.05)
    visit = tab(scripted(engine))
    visit.page.click(f"#tab-{view}")
    panel = f"#view-{view} "
    assert visit.page.is_disabled(panel + ".stop")
    visit.page.fill(panel + "textarea", "on and on")
    visit.page.press(panel + "textarea", "Enter")
    visit.until("document.querySelector('.message:last-child .text')?.textContent.endsWith('cd')")
    assert engine.running == 1 and visit.page.is_disabled(panel + ".send")
    visit.page.click(panel + ".stop")
    text = visit.answered()
    assert "abcd" in text and len(text) < 200
    assert visit.page.inner_text(panel + ".message:last-child .facts").endswith("stopped")
    until(lambda: len(engine.aborted) == 1)
    assert engine.running == 0


def test_a_stop_before_anything_came_gives_the_message_back(tab: OpenTab, scripted: Serve) -> None:
    engine = FakeEngine(delay_s=30)
    visit = tab(scripted(engine))
    visit.chat("wait")
    until(lambda: engine.running == 1)
    visit.page.click("#view-chat .stop")
    visit.until("message.value === 'wait' && conversation.childElementCount === 0")
    until(lambda: engine.running == 0)


def test_a_completion_goes_on_with_its_prompt(tab: OpenTab, scripted: Serve) -> None:
    engine = FakeEngine(saying(" there was"))
    visit = tab(scripted(engine))
    visit.page.click("#tab-completion")
    for field, value in (("max_tokens", "6"), ("temperature", "0.5"), ("top_k", "7"), ("stop", "\\n\nthe end")):
        visit.field(field, value)
    visit.page.fill("#prompt", "Once")
    visit.page.click("#view-completion .send")
    assert visit.answered() == "Once there"
    _, prompt, params = engine.submitted[0]
    assert bytes(prompt) == b"Once"
    assert (params.max_tokens, params.temperature, params.top_k, params.stop) == (6, 0.5, 7, ("\n", "the end"))


def test_an_error_names_its_field_and_gives_the_message_back(tab: OpenTab, scripted: Serve) -> None:
    visit = tab(scripted(FakeEngine()), expected="400")
    visit.field("temperature", "-1")
    visit.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = false)")
    visit.chat("hot")
    assert "temperature is -1" in visit.notice()
    assert visit.run("document.activeElement.id") == "temperature"
    assert visit.page.get_attribute("#temperature", "aria-invalid") == "true"
    assert visit.page.is_visible("#temperature") and visit.page.input_value("#message") == "hot"
    assert visit.page.inner_text("#conversation") == ""
    visit.page.fill("#temperature", "")
    visit.page.click("#view-chat .send")
    visit.answered()
    assert visit.page.is_hidden("#notice") and visit.page.get_attribute("#temperature", "aria-invalid") is None


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_tokens", "1.5", "Most tokens is 1.5; it must be a whole"),
        ("tools", "{", "list of tools is not JSON"),
    ],
)
def test_what_cannot_be_read_is_said_before_anything_is_asked(
    tab: OpenTab, scripted: Serve, field: str, value: str, words: str
) -> None:
    engine = FakeEngine()
    visit = tab(scripted(engine))
    visit.field(field, value)
    visit.chat("x")
    assert words in visit.notice()
    assert visit.run("document.activeElement.id") == field
    assert engine.submitted == [] and visit.page.input_value("#message") == "x"


def test_an_error_in_the_middle_keeps_what_came_and_says_so(tab: OpenTab, scripted: Serve) -> None:
    engine = FakeEngine(saying("half of it is there"))
    engine.fail_after, engine.error.error = 4, f"the engine broke {MARKUP}"
    visit = tab(scripted(engine), expected="500")
    visit.chat("go")
    assert "the engine broke" in visit.notice() and MARKUP in visit.notice()
    assert visit.page.inner_text(".failed .text") == "half"
    assert "the engine broke" in visit.page.inner_text(".failed .facts")
    assert visit.page.is_enabled("#view-chat .send")


def test_a_server_that_is_gone_is_told(tab: OpenTab, scripted: Serve) -> None:
    visit = tab(scripted(FakeEngine()), expected="ERR_")
    visit.page.context.set_offline(True)
    visit.chat("anybody?")
    assert "fetch" in visit.notice().lower()
    assert visit.page.input_value("#message") == "anybody?"


def test_a_key_is_asked_for_and_kept_by_the_tab_alone(tab: OpenTab, scripted: Serve) -> None:
    engine = FakeEngine(saying("welcome"))
    url = scripted(engine, keys=f"me:{KEY}")
    visit = tab(url, expected="401")
    assert "there is no API key" in visit.notice()
    assert visit.run("document.activeElement.id") == "key"
    visit.page.fill("#key", KEY)
    visit.page.press("#key", "Tab")
    visit.until("model.options.length === 1 && !notice.textContent")
    visit.chat("hello")
    assert visit.answered() == "welcome"
    kept = visit.run("[localStorage.length, document.cookie, Object.values(sessionStorage), location.href]")
    assert kept == [0, "", [KEY], url + "/"]
    visit.page.evaluate("code.open = true")
    visit.until("python.textContent.includes('environ')")
    shown = visit.page.inner_text("#code")
    assert KEY not in shown and "Bearer $DSC_SERVE_KEY" in shown and 'os.environ["DSC_SERVE_KEY"]' in shown
    visit.page.reload()
    visit.until("model.options.length === 1")
    other = tab(url, expected="401")
    assert "no API key" in other.notice() and other.page.input_value("#key") == ""


@pytest.mark.parametrize("view", ["chat", "completion"])
def test_markup_from_anywhere_is_text(tab: OpenTab, scripted: Serve, view: str) -> None:
    engine = FakeEngine(saying(MARKUP))
    visit = tab(scripted(engine, served_model_name=MARKUP), expected="TrustedHTML")
    assert visit.run("model.options[0].text") == MARKUP
    visit.page.click(f"#tab-{view}")
    visit.page.fill(f"#view-{view} textarea", MARKUP)
    visit.page.press(f"#view-{view} textarea", "Enter")
    assert visit.answered() == (MARKUP if view == "chat" else MARKUP * 2)
    visit.page.evaluate("code.open = true")
    visit.until("curl.textContent.includes('onerror')")
    assert visit.run("document.querySelectorAll('main img, main script, body script, main b b').length") == 0
    assert visit.page.title() == "dsc-serve"
    refused = visit.run("() => { try { conversation.innerHTML = '<b>x</b>'; } catch (error) { return error.name; } }")
    assert refused == "TypeError", "the browser itself refuses markup"


def test_calls_of_tools_are_shown_as_they_come_and_their_results_sent(tab: OpenTab, scripted: Serve) -> None:
    """The events are those of OpenAI's API."""
    visit = tab(scripted(FakeEngine()))
    sent: list[dict[str, Any]] = []

    def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    def call(index: int, **parts: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, **parts}]}

    calls = [
        chunk({"role": "assistant", "content": None}),
        chunk(call(0, id="a", type="function", function={"name": "weather", "arguments": ""})),
        chunk(call(0, function={"arguments": '{"city": '})),
        chunk(call(0, function={"arguments": '"Ulm"}'})),
        chunk(call(1, id="b", type="function", function={"name": "time", "arguments": "{}"})),
        chunk({}, "tool_calls"),
    ]
    answers = [calls, [chunk({"role": "assistant", "content": "It rains."}), chunk({}, "stop")]]

    def answer(route: Any) -> None:
        sent.append(route.request.post_data_json)
        body = "".join(answers[len(sent) - 1]) + "data: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    visit.page.route("**/v1/chat/completions", answer)
    function = {"name": "weather", "parameters": {"type": "object"}}
    visit.field("tools", json.dumps([{"type": "function", "function": function}]))
    visit.chat("Weather?")
    visit.page.wait_for_selector("text=Send results")
    assert visit.page.locator(".call").all_inner_texts() == ['weather({"city": "Ulm"})', "time({})"]
    assert sent[0]["tools"] == [{"type": "function", "function": function}]
    visit.page.get_by_label("Result of weather").fill("rain")
    visit.page.get_by_label("Result of time").fill("noon")
    visit.page.click("text=Send results")
    assert visit.answered() == "It rains."
    asked, told, *results = sent[1]["messages"]
    assert asked == {"role": "user", "content": "Weather?"}
    assert [made["function"]["arguments"] for made in told["tool_calls"]] == ['{"city": "Ulm"}', "{}"]
    assert results == [
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "tool", "tool_call_id": "b", "content": "noon"},
    ]


def test_a_call_goes_through_the_server_and_its_result_back_to_the_model(tab: OpenTab, scripted: Serve) -> None:
    called = '{"name": "weather", "arguments": {"city": "Ulm"}}'
    engine = FakeEngine(lambda prompt, _: list(b"It rains." if b"Result of" in bytes(prompt) else called.encode()))
    visit = tab(scripted(engine))
    visit.field("tools", json.dumps([{"type": "function", "function": {"name": "weather"}}]))
    visit.chat("Weather?")
    visit.page.wait_for_selector("text=Send results")
    assert visit.page.locator(".call").all_inner_texts() == ['weather({"city": "Ulm"})']
    visit.page.get_by_label("Result of weather").fill("rain")
    visit.page.click("text=Send results")
    assert visit.answered() == "It rains."
    asked, answered = (bytes(prompt).decode() for _, prompt, _ in engine.submitted)
    assert asked.endswith("<user>Weather?") and '"weather"' in asked, "the model is told of the tool"
    assert answered.endswith(f"<assistant>{called}<user>Result of weather:\nrain")


@pytest.mark.parametrize("root_path", ["/llm", "/a/b"])
@pytest.mark.parametrize("way", ["left on", "taken off", "taken off, without the setting"])
def test_it_works_behind_a_path(tab: OpenTab, scripted: Serve, root_path: str, way: str) -> None:
    class Strip:
        """What a proxy does that takes the path off."""

        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            assert scope["path"].startswith(root_path + "/"), "it asks for nothing outside its path"
            await self.app({**scope, "path": scope["path"].removeprefix(root_path)}, receive, send)

    settings = {} if "without" in way else {"root_path": root_path}
    url = scripted(FakeEngine(saying("here")), wrap=None if way == "left on" else Strip, **settings)
    visit = tab(f"{url}{root_path}/")
    visit.chat("where?")
    assert visit.answered() == "here"
    visit.page.click("#tab-live")
    visit.page.wait_for_selector("#live-note:has-text('dsc-serve')")
    assert all(address.startswith(f"{url}{root_path}/") for address in visit.asked)
    if way == "left on":
        assert tab(url + root_path).page.locator("#model option").count() == 1, "without the last slash too"


def test_an_answer_has_the_form_that_was_asked_for(tab: OpenTab, tiny: RunningServer) -> None:
    visit = tab(tiny.url)
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    forms = {
        "json_schema": (json.dumps(schema), lambda text: set(json.loads(text)) == {"age"}),
        "regex": ("[0-9]{3}-[0-9]{2}", lambda text: len(text) == 6 and text[3] == "-"),
        "choice": ("Peter\nPaul", lambda text: text in ("Peter", "Paul")),
        "grammar": ('start: "yes" | "no"', lambda text: text in ("yes", "no")),
    }
    visit.field("max_tokens", "40")
    for kind, (text, fits) in forms.items():
        visit.field("form-kind", kind)
        visit.field("form-text", text)
        visit.chat("How old?")
        assert fits(visit.answered()), kind
    visit.field("form-kind", "none")
    assert visit.page.is_hidden("#form-text")


@pytest.mark.parametrize("view", ["chat", "completion"])
def test_the_code_does_what_the_page_does(tab: OpenTab, tiny: RunningServer, view: str) -> None:
    """It is copied by the button, and run."""
    visit = tab(tiny.url, permissions=["clipboard-read", "clipboard-write"])
    visit.page.click(f"#tab-{view}")
    awkward = "It's \"so\" $HOME `x` \\n\n… \u2028 'end'"
    fields = {
        "max_tokens": "8",
        "temperature": "0",
        "top_k": "5",
        "stop": "it's\\n",
        "form-kind": "regex",
        "form-text": "[a-z' ]{4,9}",
    }
    for name, value in fields.items():
        visit.field(name, value)
    visit.page.fill(f"#view-{view} textarea", awkward)
    visit.page.evaluate("code.open = true")
    codes = {}
    for name in ("curl", "python"):
        visit.until(f"{name}.textContent.includes('it')")
        visit.page.click(f".copy[data-of={name}]")
        visit.page.wait_for_selector("#copied:has-text('Copied')")
        codes[name] = visit.run("navigator.clipboard.readText()")
        visit.page.evaluate("copied.textContent = ''")
    visit.page.press(f"#view-{view} textarea", "Enter")
    shown = visit.answered().removeprefix(awkward if view == "completion" else "")
    python = subprocess.run([sys.executable, "-c", codes["python"]], capture_output=True, text=True, timeout=60)
    assert python.stdout == shown + "\n", python.stderr
    curl = subprocess.run(["bash", "-c", codes["curl"]], capture_output=True, text=True, timeout=60)
    events = [json.loads(line[6:]) for line in curl.stdout.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    told = [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices]
    assert "".join(told) == shown and len(shown) >= 4
    assert httpx.get(tiny.url + "/health").status_code == 200


def test_code_can_be_copied_where_the_browser_lends_no_clipboard(tab: OpenTab, scripted: Serve) -> None:
    """As on a page that came by http from another machine."""
    visit = tab(scripted(FakeEngine()))
    visit.page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined }); code.open = true")
    visit.until("curl.textContent.includes('Hello')")
    visit.page.click(".copy[data-of=curl]")
    visit.page.wait_for_selector("#copied:not(:empty)")
    visit.page.focus("#message")
    visit.page.keyboard.press("Control+V")
    assert visit.page.input_value("#message").startswith("curl -N 'http://127.0.0.1")
