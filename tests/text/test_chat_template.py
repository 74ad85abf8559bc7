from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsc_serve.config import API_KEYS
from dsc_serve.text import renderer
from dsc_serve.text.broken_template import BrokenTemplate
from dsc_serve.text.chat import ChatTemplate, ChatTemplateError, default_template
from dsc_serve.text.tokenizer import Tokenizer

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
MESSAGES: list[dict[str, object]] = [{"role": "user", "content": "1 < 2 & <b>?"}]


def render(template: str, messages: list[dict[str, object]] = MESSAGES, **special: str) -> str:
    return ChatTemplate(template, special).render(messages)


def test_blocks_leave_no_white_space_and_content_stays_unescaped() -> None:
    template = ChatTemplate(CHATML, {})
    prompt = "<|im_start|>user\n1 < 2 & <b>?<|im_end|>\n"
    assert template.render(MESSAGES) == prompt + "<|im_start|>assistant\n"
    assert template.render(MESSAGES, add_generation_prompt=False) == prompt


def test_content_is_data_and_never_a_template() -> None:
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "{{ 7 * 7 }}"}]) == "{{ 7 * 7 }}"


def test_templates_have_what_the_field_expects_of_them() -> None:
    assert render("{{ bos_token }}{{ eos_token }}", bos_token="<s>") == "<s>"
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == json.dumps({"b": "<é>", "a": 1}, ensure_ascii=False)
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}{{ 'a' }}{% endgeneration %}b") == "ab"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% if tools is not none %}tools{% endif %}") == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", r"^chat template: roles must alternate$"),
        ("{{ messages[0].content + 1 }}", r"^chat template: TypeError: "),
        ("{{ messages[0].nothing.more }}", r"no attribute 'nothing'"),
        ("{{ messages.append(1) }}", r"'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", r"unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", r"Range too big"),
    ],
)
def test_errors_while_rendering_are_one_line(template: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message) as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_a_template_that_does_not_compile_names_its_line() -> None:
    with pytest.raises(ChatTemplateError, match=r"line 2: .*Encountered unknown tag 'nonsense'"):
        ChatTemplate("a\n{% nonsense %}", {})


def test_the_default_of_several_templates_is_taken() -> None:
    assert default_template([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]) == "d"
    assert default_template({"default": "d"}) == "d"
    with pytest.raises(ChatTemplateError, match=r"entries named \['rag'\]"):
        default_template([{"name": "rag", "template": "r"}])
    with pytest.raises(ChatTemplateError, match="of type int"):
        default_template(3)


def test_a_template_file_goes_before_the_config(model_folder: Callable[..., Path]) -> None:
    folder = model_folder(chat_template=[{"name": "default", "template": "{{ bos_token }}c"}], bos_token="<|bos|>")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None and tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([]) == "<|bos|>c"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}f")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None and tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([]) == "<|bos|>f"


LOOPS = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
COSTLY = {
    "nested loops": LOOPS,
    "text times a number": "{{ 'a' * 10**9 * 4 }}",
    "text times a number that is not known before": "{{ messages[0].role * 10**9 * 4 }}",
    "list times a number": "{{ ([0] * 10**9) | length }}",
    "a power": "{{ 10**(10**8) }}",
    "a power that is not known before": "{{ (messages | length + 9) ** (10**8) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "indent": "{{ 'a\\nb' | indent(10**10) }}",
    "format": "{{ '%9999999999d' % 1 }}",
    "format of texts": "{{ '{:9999999999}'.format(1) }}",
    "lipsum": "{{ lipsum(n=10**7) }}",
    "a recursive macro": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}",
    "a recursive loop": "{% for m in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "doubling": "{% set n = namespace(t='ab') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "sorting": "{% for i in range(100000) %}{% set x = range(100000) | sort(reverse=i % 2 == 0) %}{% endfor %}",
    "replacing": "{{ (('a' * 10**7) | replace('a', 'b' * 1000)) | length }}",
    "json": "{{ range(100000) | list | tojson(indent=100000) }}",
    "much text": "{% for a in range(20000) %}{{ 'a' * 1000 }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep lists": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "deep loops": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "deep conditions": "{% if 1 %}" * 2_000 + "{% endif %}" * 2_000,
    "many digits": "{{ " + "9" * 10_000 + " }}",
    "a lone surrogate": r"{{ '\ud800' }}",
    "an unknown filter": "{{ 1 | nothing }}",
    "a way out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an attribute of a method": "{{ messages.append.__self__ }}",
}


def memory_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less time than there is in earnest, so that tests do not wait for it."""
    monkeypatch.setattr(renderer, "CPU_S", 0.3)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("template", COSTLY.values(), ids=COSTLY)
def test_a_template_that_takes_too_much_ends_alone(template: str) -> None:
    before, began = memory_mb(), time.monotonic()
    with pytest.raises(ChatTemplateError, match=r"^(chat template|the messages)") as refused:
        render(template)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000
    assert time.monotonic() - began < 2 * renderer.WAIT_S
    assert memory_mb() - before < 50


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("cost", [LOOPS, "{{ messages[0].role * 10**9 * 4 }}"], ids=["time", "memory"])
def test_a_chat_that_takes_too_much_ends_alone(cost: str) -> None:
    template = ChatTemplate(
        f"{{% if messages[0].content == 'much' %}}{cost}{{% endif %}}{{{{ messages[0].content }}}}", {}
    )
    for _ in range(2):
        assert template.render(MESSAGES) == MESSAGES[0]["content"]
        with pytest.raises(ChatTemplateError):
            template.render([{"role": "user", "content": "much"}])
    assert template.render(MESSAGES) == MESSAGES[0]["content"]


def test_renderers_end_with_their_template_and_hold_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEYS, "someone:a-secret-of-some-length")
    template = ChatTemplate(CHATML, {})
    template.render(MESSAGES)
    (process,) = template._idle
    environment = Path(f"/proc/{process._process.pid}/environ").read_bytes()
    assert environment and API_KEYS.encode() not in environment
    del template
    gc.collect()
    assert not process.alive


def test_one_that_was_killed_between_two_chats_is_replaced() -> None:
    template = ChatTemplate(CHATML, {})
    first = template.render(MESSAGES)
    template._idle[0]._process.kill()
    template._idle[0]._process.wait()
    assert template.render(MESSAGES) == first


def test_threads_that_render_at_once_have_processes_of_their_own() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    with ThreadPoolExecutor(3) as threads:
        texts = [f"text {i}" for i in range(60)]
        found = threads.map(lambda text: template.render([{"role": "user", "content": text}]), texts)
        assert list(found) == texts
    assert 1 <= len(template._idle) <= 3


def test_a_lone_surrogate_in_a_message_is_named() -> None:
    with pytest.raises(ChatTemplateError, match="lone surrogate"):
        render("{{ messages[0].content }}", [{"role": "user", "content": "\ud800"}])


@pytest.mark.parametrize(
    ("template", "knows"),
    [
        (CHATML, False),
        ("{% if tools %}x{% endif %}", True),
        ("{{ 'tools' }}", False),
        ("{% for tool in tools or [] %}{{ tool }}{% endfor %}", True),
        ("{{ 10 ** (10 ** 9) }}{{ tools }}", True),  # which nobody may compute to find that out
    ],
)
def test_a_template_that_speaks_of_tools_is_told_by_reading_it(template: str, knows: bool) -> None:
    began = time.process_time()
    assert ChatTemplate(template, {}).knows_tools is knows
    assert time.process_time() - began < 1


def test_tools_and_arguments_reach_the_template() -> None:
    call = {"function": {"name": "f", "arguments": {"a": "é"}}}
    template = ChatTemplate("{{ tools[0].name }} {{ messages[0].tool_calls[0].function.arguments }}", {})
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert template.render([message], tools=[{"name": "f"}]) == 'f {"a": "é"}'


@pytest.mark.usefixtures("hurried")
def test_what_does_not_compile_is_found_without_messages() -> None:
    for template in ("{{ 'a' * 10**9 * 4 }}", "{{ 10**(10**8) }}", "{{ 1 | nothing }}"):
        with pytest.raises(ChatTemplateError):
            ChatTemplate(template, {}).check()
    ChatTemplate(CHATML, {}).check()


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}', r"chat template, line 1: "),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": ""}]}', r"entries named \['rag'\]"),
        ("tokenizer_config.json", b'{"chat_template": 3}', r"chat_template is of type int"),
        ("tokenizer_config.json", b'{"chat_template": {"default": 3}}', r"chat_template has entries named"),
        ("chat_template.jinja", b"{% for %}", r"chat template, line 1"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja cannot be read"),
    ],
)
def test_a_broken_template_is_told_to_chats_alone(
    file: str, content: bytes, fault: str, model_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_folder()
    (folder / file).write_bytes(content)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None and isinstance(tokenizer.chat_template, BrokenTemplate)
    assert tokenizer.decode(tokenizer.encode("The quick")) == "The quick"
    with pytest.raises(ChatTemplateError, match=f"^this model's chat template is broken: .*{fault}") as caught:
        tokenizer.chat_template.render(MESSAGES)
    assert "\n" not in str(caught.value)
    assert f"{folder}: chats cannot be served: " in caplog.text
