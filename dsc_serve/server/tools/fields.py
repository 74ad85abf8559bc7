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
    name: NAME
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = Field(
        default=None,
        description="arguments follow `parameters`, a JSON schema, also where the model may choose whether it calls",
    )


class ToolFields(Fields):
    type: Literal["function"]
    function: FunctionFields


@dataclass(frozen=True)
class NamedTool:
    """The one tool that must be called."""

    name: str


@dataclass(frozen=True)
class AllowedTools:
    """The only tools that may be called; all are shown to the model."""

    names: tuple[str, ...]
    must: bool  # one of them must be called


Choice = Literal["none", "auto", "required"] | NamedTool | AllowedTools
CHOICES = ("none", "auto", "required")
MODES = ("auto", "required")  # of allowed tools
ALLOWED = "allowed_tools"


@dataclass(frozen=True)
class ChoiceForm:
    """How an endpoint writes choices of tools."""

    named: Json  # one tool, with "…" for its name
    nested: bool  # whether the mode and the list of allowed tools stand in an object of their own

    @property
    def name_field(self) -> str:
        """Where the name of the one tool stands."""
        return "tool_choice.function.name" if "function" in self.named else "tool_choice.name"

    @property
    def list_field(self) -> str:
        """Where the allowed tools stand."""
        return f"tool_choice.{ALLOWED}.tools" if self.nested else "tool_choice.tools"

    def name_of(self, value: Any) -> str | None:
        """The tool that a value names; None where it is of another form."""
        if not isinstance(value, dict) or value.keys() != self.named.keys() or value["type"] != "function":
            return None
        inner = value.get("function", value)
        named = isinstance(inner, dict) and inner.keys() == self.named.get("function", self.named).keys()
        name = inner["name"] if named else None
        return name if isinstance(name, str) else None

    def allowed_of(self, value: Any) -> AllowedTools | None:
        """As `name_of`, of a list of allowed tools. Raises ApiError (400) where only what it lists is wrong."""
        if not isinstance(value, dict) or value.get("type") != ALLOWED:
            return None
        inner = {key: item for key, item in value.items() if key != "type"}
        if self.nested:
            inner = inner[ALLOWED] if inner.keys() == {ALLOWED} else {}
        if not isinstance(inner, dict) or inner.keys() != {"mode", "tools"} or inner["mode"] not in MODES:
            return None
        listed = inner["tools"]
        if not isinstance(listed, list) or not listed or len(listed) > MAX_TOOLS:
            field, what = self.list_field, f"a list of 1 to {MAX_TOOLS} tools"
            raise bad_request(field, f"{field} is {shown(listed)}; it must be {what}")
        names = [self.name_of(item) for item in listed]
        for i, name in enumerate(names):
            if name is None:
                field, form = f"{self.list_field}.{i}", to_json(self.named).decode()
                raise bad_request(field, f"{field} is {shown(listed[i])}; it must be {form}")
        return AllowedTools(tuple(name for name in names if name is not None), inner["mode"] == "required")

    def choice(self, value: Any) -> Choice | None:
        """A `tool_choice`. Raises ApiError (400)."""
        if value is None or (isinstance(value, str) and value in CHOICES):
            return value  # type: ignore[return-value]  # it is one of CHOICES
        name = self.name_of(value)
        found = self.allowed_of(value) if name is None else NamedTool(name)
        if found is not None:
            return found
        parts = {"mode": "auto", "tools": [self.named]}
        forms = self.named, {"type": ALLOWED, **({ALLOWED: parts} if self.nested else parts)}
        allowed = " or ".join(to_json(form).decode() for form in forms)
        raise bad_request(
            "tool_choice", f'tool_choice is {shown(value)}; it must be "none", "auto", "required", {allowed}'
        )

    def written(self, choice: Choice | None) -> object:
        """A choice as the client wrote it."""
        if isinstance(choice, NamedTool):
            return self._one(choice.name)
        if not isinstance(choice, AllowedTools):
            return choice
        parts = {"mode": "required" if choice.must else "auto", "tools": [self._one(name) for name in choice.names]}
        return {"type": ALLOWED, **({ALLOWED: parts} if self.nested else parts)}

    def _one(self, name: str) -> Json:
        if "function" in self.named:
            return {"type": "function", "function": {"name": name}}
        return {"type": "function", "name": name}


IN_CHATS = ChoiceForm({"type": "function", "function": {"name": "…"}}, nested=True)
FLAT = ChoiceForm({"type": "function", "name": "…"}, nested=False)


ChoiceField = Annotated[Choice | None, PlainValidator(IN_CHATS.choice, json_schema_input_type=Json | str | None)]
FlatChoiceField = Annotated[Choice | None, PlainValidator(FLAT.choice, json_schema_input_type=Json | str | None)]


class CallFunction(Fields):
    name: str
    arguments: str


class CallFields(Fields):
    """A call in an assistant's message, as an answer had it."""

    id: str
    type: Literal["function"] = "function"
    function: CallFunction
    index: int | None = Field(default=None, description="as streams have it")


Tools = Annotated[list[ToolFields], Field(max_length=MAX_TOOLS, fail_fast=True)]


@dataclass(frozen=True)
class Tool:
    """A tool of a request."""

    name: str
    description: str
    parameters: Json
    strict: bool
    field: str  # what the client calls its parameters


@dataclass(frozen=True)
class ToolChoice:
    """Tools that are shown to the model, and what the answer may do with them. No tools: none may be called."""

    tools: tuple[Tool, ...] = ()
    must: bool = False  # whether it must call
    allowed: frozenset[str] | None = None  # which it may call; None: any
    single: bool = False  # whether it ends with its first call

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.callable)

    @property
    def callable(self) -> tuple[Tool, ...]:
        return tuple(tool for tool in self.tools if self.allowed is None or tool.name in self.allowed)

    @property
    def restricted(self) -> bool:
        """Whether the model is shown tools that it may not call."""
        return len(self.callable) < len(self.tools)


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
    tools: tuple[Tool, ...], choice: Choice | None, parallel: bool | None, form: ChoiceForm = IN_CHATS
) -> ToolChoice:
    """form: how the client wrote the choice. Raises ApiError (400)."""
    if not tools:
        if choice not in (None, "none", "auto"):
            value = shown(form.written(choice))
            raise bad_request("tool_choice", f"tool_choice is {value} but there are no tools; send tools with it")
        return ToolChoice()
    if choice == "none":
        return ToolChoice()
    single = parallel is False
    if isinstance(choice, NamedTool):
        check_known(tools, choice.name, form.name_field)
        return ToolChoice(tools, must=True, allowed=frozenset({choice.name}), single=True)
    if isinstance(choice, AllowedTools):
        for i, name in enumerate(choice.names):
            check_known(tools, name, f"{form.list_field}.{i}")
        return ToolChoice(tools, choice.must, frozenset(choice.names), single)
    return ToolChoice(tools, choice == "required", single=single)


def check_known(tools: Sequence[Tool], name: str, field: str) -> None:
    """Raises ApiError (400) where there is no tool of that name."""
    if name not in {tool.name for tool in tools}:
        allowed = ", ".join(shown(tool.name) for tool in tools)
        raise bad_request(field, f"{field} is {shown(name)}; it must be the name of one of the tools: {allowed}")
