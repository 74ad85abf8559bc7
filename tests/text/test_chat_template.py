from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}', r"chat template, line 1: "),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": ""}]}', r"entries named \['rag'\]"),
        ("tokenizer_config.json", b'{"chat_template": 3}', r"chat_template is of type int"),
        ("tokenizer_config.json", b'{"chat_template": {"default": 3}}', r"chat_template has entries named"),
        ("tokenizer_config.json", b'{"chat_template": "{{ x | nothing }}"}', r"chat template, line 1: No filter named"),
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
