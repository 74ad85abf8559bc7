"""Requests whose answers must be calls, and whether they are."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx

MESSAGES = [{"role": "user", "content": "What is the weather in Paris, and what is 7 plus 5?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"$ref": "#/$defs/days"},
    },
    "required": ["city", "unit"],
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 14}},
}
SUM = {
    "type": "object",
    "properties": {
        "numbers": {"type": "array", "items": {"type": "integer", "minimum": -99, "maximum": 99}, "maxItems": 4},
        "note": {"anyOf": [{"type": "string", "maxLength": 10}, {"type": "null"}]},
    },
    "required": ["numbers"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Weather of a city.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "sum", "parameters": SUM}},
]
STRICT = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
CHOICES: dict[str, dict[str, Any]] = {
    "required": {"tools": TOOLS, "tool_choice": "required"},
    "one required": {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    "named": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sum"}}},
    "strict": {"tools": STRICT, "tool_choice": "required", "parallel_tool_calls": False},
}


def asked(url: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The choice of a whole answer."""
    response = httpx.post(f"{url}/v1/chat/completions", json={"messages": MESSAGES, **fields}, timeout=300)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def streamed(url: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The same choice put together from the events of a stream."""
    message: dict[str, Any] = {"content": ""}
    reason = None
    body = {"messages": MESSAGES, **fields, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            message["content"] += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", []):
                calls = message.setdefault("tool_calls", [])
                if "id" in call:
                    calls.append({"id": call["id"], "function": dict(call["function"])})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return {"message": message, "finish_reason": reason}


def check(url: str, way: str, i: int) -> bool:
    """Whether both answers of a request are the same valid calls. Both are greedy or have one seed."""
    fields = {**CHOICES[way], "seed": i, "temperature": (0.7, 0.0, 1.0, 1.3)[i % 4], "max_tokens": 150}
    whole, told = asked(url, fields), streamed(url, fields)
    assert whole["finish_reason"] == told["finish_reason"], (whole, told)
    functions = [call["function"] for call in whole["message"]["tool_calls"]]
    assert functions == [call["function"] for call in told["message"]["tool_calls"]]
    assert whole["message"]["content"] is None and told["message"]["content"] == ""
    if whole["finish_reason"] == "length" and way == "required":
        functions = functions[:-1]  # it was writing one more call
    else:
        assert whole["finish_reason"] == "tool_calls", whole
    assert len(functions) == 1 or (functions and way == "required")
    for function in functions:
        valid(function["name"], function["arguments"])
    assert way != "named" or functions[0]["name"] == "sum"
    return True


def valid(name: str, text: str) -> None:
    """Raises where arguments are not what the tool's schema says, or have white space that is free."""
    arguments = json.loads(text)
    without_signs = re.sub(r"(?<=[\[ ])-0(?=[,\]}])", "0", text)  # -0 is an integer of JSON, and 0 once it is read
    assert json.dumps(arguments, ensure_ascii=False) == without_signs or "\\" in text, text
    if name == "weather":
        assert arguments.keys() <= {"city", "unit", "days"} and arguments.keys() >= {"city", "unit"}
        assert isinstance(arguments["city"], str) and len(arguments["city"]) <= 20
        assert arguments["unit"] in ("celsius", "fahrenheit")
        assert type(arguments.get("days", 1)) is int and 1 <= arguments.get("days", 1) <= 14
    else:
        assert name == "sum" and arguments.keys() <= {"numbers", "note"} and "numbers" in arguments
        assert len(arguments["numbers"]) <= 4
        assert all(type(number) is int and -99 <= number <= 99 for number in arguments["numbers"])
        note = arguments.get("note")
        assert note is None or (isinstance(note, str) and len(note) <= 10)
