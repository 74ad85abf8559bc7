"""Calls for the OpenAPI document, and what its examples of tools have in common."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

AGE = {"type": "integer", "minimum": 0, "maximum": 99}
SCHEMA = {"type": "object", "properties": {"age": AGE}, "required": ["age"]}
TOOL = {"type": "function", "function": {"name": "set_age", "description": "Note an age.", "parameters": SCHEMA}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "set_age", "arguments": '{"age": 7}'}}
CALLED: list[dict[str, Any]] = [
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "noted"},
]


class Described(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CalledFunction(Described):
    name: str
    arguments: str


class ToolCall(Described):
    id: str
    type: Literal["function"]
    function: CalledFunction
