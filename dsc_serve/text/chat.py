"""Chat templates: a list of messages to the one text that the model was trained to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
import jinja2.nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplateError(ValueError):
    """A chat template that is broken or that refuses the messages; one line."""


class GenerationBlock(Extension):
    """`{% generation %}` marks the text to train on; for serving it is nothing but its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates of the field expect it: without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class ChatTemplate:
    """A compiled chat template. Messages are dicts with at least `role` and `content`.

    template: jinja2 source. special_tokens: names such as "bos_token" to their text, readable in the template.
    Raises ChatTemplateError when the template does not compile.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"chat template, line {error.lineno}: {one_line(error)}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: list[dict[str, object]], add_generation_prompt: bool = True) -> str:
        """The text to encode, ending where the assistant's answer begins if `add_generation_prompt`.

        Raises ChatTemplateError when the template refuses the messages or cannot handle them.
        """
        try:
            return self._template.render(
                **self._special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"chat template: {one_line(error)}") from error
        except Exception as error:  # a template is a program: what its expressions raise depends on the messages
            raise ChatTemplateError(f"chat template: {type(error).__name__}: {one_line(error)}") from error


def default_template(value: object) -> str | None:
    """The template to use of `chat_template` in tokenizer_config.json: a string, or a list of {name, template}.

    Raises ChatTemplateError when it is neither, or when no entry of the list is named "default".
    """
    if value is None or isinstance(value, str):
        return value
    entries: dict[str, object] = {}
    if isinstance(value, dict):
        entries = value
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        entries = {str(entry.get("name")): entry.get("template") for entry in value}
    template = entries.get("default")
    if isinstance(template, str):
        return template
    raise ChatTemplateError(
        f"chat_template has entries named {sorted(entries)}; it must be a text or have one named 'default'"
        if entries
        else f"chat_template is of type {type(value).__name__}; it must be a text or a list of {{name, template}}"
    )


def load_chat_template(
    folder: Path, config: Mapping[str, object], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The folder's chat template: chat_template.jinja, else `chat_template` of its tokenizer_config.json, else None.

    Raises ChatTemplateError.
    """
    path = folder / TEMPLATE_FILE
    try:
        template = path.read_text(encoding="utf-8") if path.is_file() else default_template(config.get("chat_template"))
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"{TEMPLATE_FILE} cannot be read: {one_line(error)}") from error
    return None if template is None else ChatTemplate(template, special_tokens)
