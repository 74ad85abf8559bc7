"""The fields of tools and of their calls, as chats have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator
from pydantic_core import to_json

from dsc_serve.server.errors import bad_request, shown
from dsc_serve.server.fields import Fields

MAX_TOOLS = 128
NAME = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Json = dict[str, Any]


class FunctionFields(Fields):
    """strict: arguments follow `parameters`, a JSON schema, also where the model may choose whether it calls."""

    name: NAME
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class ToolFields(Fields):
    type: Literal["function"]
    function: FunctionFields


@dataclass(frozen=True)
class NamedTool:
    """The one tool that must be called."""

    name: str


Choice = Literal["none", "auto", "required"] | NamedTool
CHOICES = ("none", "auto", "required")
NAMED: Json = {"type": "function", "function": {"name": "…"}}


def check_choice(value: Any, form: Json = NAMED) -> Choice | None:
    """A `tool_choice`; form: how a named one is written. Raises ApiError (400)."""
    if value is None or (isinstance(value, str) and value in CHOICES):
        return value  # type: ignore[return-value]  # it is one of CHOICES
    name = value
    for key, inner in form.items():  # its keys and texts must be there, "…" stands for any text
        if isinstance(value, dict) and isinstance(inner, dict) and isinstance(value.get(key), dict):
            name = value[key].get("name") if value[key].keys() == inner.keys() else None
        elif isinstance(value, dict) and inner == "…":
            name = value.get(key)
    same = isinstance(value, dict) and value.keys() == form.keys() and value["type"] == form["type"]
    if same and isinstance(name, str):
        return NamedTool(name)
    allowed = f'"none", "auto", "required" or {to_json(form).decode()}'
    raise bad_request("tool_choice", f"tool_choice is {shown(value)}; it must be {allowed}")


ChoiceField = Annotated[Choice | None, PlainValidator(check_choice, json_schema_input_type=Json | str | None)]


class CallFunction(Fields):
    name: str
    arguments: str


class CallFields(Fields):
    """A call in an assistant's message, as an answer had it. index: as streams have it."""

    id: str
    type: Literal["function"] = "function"
    function: CallFunction
    index: int | None = None


Tools = Annotated[list[ToolFields], Field(max_length=MAX_TOOLS, fail_fast=True)]


@dataclass(frozen=True)
class Tool:
    """A tool of a request. field: what the client calls its parameters."""

    name: str
    description: str
    parameters: Json
    strict: bool
    field: str


@dataclass(frozen=True)
class ToolChoice:
    """Tools that are offered, and what the answer may do with them: the one named `only` alone, must call, may call
    several times. No tools: none may be called.
    """

    tools: tuple[Tool, ...] = ()
    must: bool = False
    only: str | None = None
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.callable)

    @property
    def callable(self) -> tuple[Tool, ...]:
        return tuple(tool for tool in self.tools if self.only in (None, tool.name))

    @property
    def single(self) -> bool:
        return self.only is not None or not self.parallel


def tools_of(given: Sequence[ToolFields]) -> tuple[Tool, ...]:
    """Raises ApiError (400)."""
    tools = tuple(
        Tool(
            function.name,
            function.description or "",
            function.parameters or {},
            function.strict is True,
            f"tools.{i}.function.parameters",
        )
        for i, function in enumerate(tool.function for tool in given)
    )
    check_tools(tools)
    return tools


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises ApiError (400) for two of one name, or parameters that are no object's."""
    for i, tool in enumerate(tools):
        if tool.name in {other.name for other in tools[:i]}:
            field = f"{tool.field.removesuffix('parameters')}name"
            raise bad_request(field, f"{field} is {shown(tool.name)}, which is the name of an earlier tool too")
        kind = tool.parameters.get("type", "object")
        if kind != "object":
            field = f"{tool.field}.type"
            raise bad_request(field, f'{field} is {shown(kind)}; it must be "object"')


def choice_of(
    tools: tuple[Tool, ...], choice: Choice | None, parallel: bool | None, field: str = "tool_choice.function.name"
) -> ToolChoice:
    """field: where the client names the one tool that must be called. Raises ApiError (400)."""
    named = choice.name if isinstance(choice, NamedTool) else None
    if not tools:
        if named is not None or choice == "required":
            value = shown(choice if isinstance(choice, str) else named)
            raise bad_request("tool_choice", f"tool_choice is {value} but there are no tools; send tools with it")
        return ToolChoice()
    if named is not None and named not in {tool.name for tool in tools}:
        allowed = ", ".join(shown(tool.name) for tool in tools)
        raise bad_request(field, f"{field} is {shown(named)}; it must be the name of one of the tools: {allowed}")
    if choice == "none":
        return ToolChoice()
    return ToolChoice(tools, named is not None or choice == "required", named, parallel is not False)
