"""What a chat template can see and do while it is rendered. It is a program: it runs in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import datetime
from typing import NoReturn

import jinja2
import jinja2.nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, object]

GIVEN = frozenset({"messages", "tools", "add_generation_prompt"})  # which a request says in fields of its own
BY_JINJA = ("loop", "caller", "varargs", "kwargs", "self")


class GenerationBlock(Extension):
    """`{% generation %}` marks the text to train on; for serving it is nothing but its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Arguments(dict[str, object]):
    """Arguments of a call. Templates that take them for an object get one, those that write them as text get JSON."""

    def __str__(self) -> str:
        return to_json(self)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


def with_arguments(message: Message) -> Message:
    """The message, with the arguments of its calls as templates may want them."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    changed = deepcopy(calls)
    for call in changed:
        if isinstance(call["function"]["arguments"], dict):
            call["function"]["arguments"] = Arguments(call["function"]["arguments"])
    return {**message, "tool_calls": changed}


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


def environment() -> jinja2.Environment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def fault(error: BaseException) -> str:
    """What is wrong with a template, or with the messages for it, in one line."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"chat template, line {error.lineno}: {one_line(error)}"
    if isinstance(error, jinja2.TemplateError):
        return f"chat template: {one_line(error)}"
    if isinstance(error, RecursionError):
        return "chat template: it is nested too deeply"
    return f"chat template: {type(error).__name__}: {one_line(error)}"


def syntax_fault(template: str) -> str:
    """What is wrong with the source of a template, "" where nothing is seen without compiling it.

    Compiling one computes its constants, of whatever size.
    """
    try:
        environment().parse(template)
    except Exception as error:  # a number of too many digits, a nesting that is too deep, …
        return fault(error)
    return ""


def names_in(template: str) -> frozenset[str]:
    """Names that the source of a template speaks of; none where it cannot be parsed.

    It is only read: the library's own way of asking for variables would compute constants.
    """
    try:
        return frozenset(node.name for node in environment().parse(template).find_all(jinja2.nodes.Name))
    except Exception:
        return frozenset()


def variables_in(template: str) -> frozenset[str]:
    """Of these the ones that whoever renders it may set: that it reads, and that are not its own or the sandbox's."""
    try:
        made = environment()
        parsed = made.parse(template)
        read, own = loaded(parsed), set(BY_JINJA)
        for loop in parsed.find_all(jinja2.nodes.For):
            own |= named(loop.target)
        for macro in parsed.find_all(jinja2.nodes.Macro):
            own |= {macro.name, *(argument.name for argument in macro.args)}
        before: set[str] = set()
        for node in parsed.body:
            before |= loaded(node)
            if isinstance(node, jinja2.nodes.Assign | jinja2.nodes.AssignBlock):
                own |= named(node.target) - before  # set whatever it was
    except Exception:
        return frozenset()
    return frozenset(read - own - made.globals.keys() - GIVEN)


def loaded(node: jinja2.nodes.Node) -> set[str]:
    """Names that are read in a part of a template."""
    return {name.name for name in node.find_all(jinja2.nodes.Name) if name.ctx == "load"}


def named(target: jinja2.nodes.Node) -> set[str]:
    """Names that an assignment, or a loop, gives values to."""
    return {name.name for name in (target, *target.find_all(jinja2.nodes.Name)) if isinstance(name, jinja2.nodes.Name)}


class Sandbox:
    """A compiled template. Raises what compiling raises."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self._template = environment().from_string(template)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Message] = (),
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Raises anything: what a template's expressions raise depends on the messages."""
        given: dict[str, object] = {
            "documents": None,
            **(variables or {}),
            **self._special_tokens,
            "messages": [with_arguments(message) for message in messages],
            "tools": list(tools) or None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._template.render(given)
