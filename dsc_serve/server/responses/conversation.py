"""The items of an input as the messages that templates know."""

from __future__ import annotations

from typing import Any

from dsc_serve.server.errors import bad_request, shown
from dsc_serve.server.responses.schema import (
    CallItem,
    InputText,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
    ResultItem,
)
from dsc_serve.server.tools.messages import Known, arguments_of, call_of


def conversation(fields: ResponsesRequest) -> list[Known]:
    """Raises ApiError (400) where a result is of no call before it."""
    known: list[Known] = []
    if fields.instructions:
        known.append({"role": "system", "content": fields.instructions})
    if isinstance(fields.input, str):
        return [*known, {"role": "user", "content": fields.input}]
    called: dict[str, str] = {}
    reasoning = ""  # that belongs to the answer that follows
    for i, item in enumerate(fields.input):
        if isinstance(item, ReasoningItem):
            reasoning += "".join(part.text for part in item.content or [])
            continue
        if isinstance(item, MessageItem):
            role = "system" if item.role == "developer" else item.role
            message: Known = {"role": role, "content": text_of(item.content)}
        elif isinstance(item, ResultItem):
            if item.call_id not in called:
                param, allowed = f"input.{i}.call_id", "it must be that of an earlier item of type function_call"
                raise bad_request(param, f"{param} is {shown(item.call_id)}; {allowed}")
            message = {"role": "tool", "content": text_of(item.output), "name": called[item.call_id]}
            message["tool_call_id"] = item.call_id
        else:
            called[item.call_id] = item.name
            add_call(known, item, reasoning)
            reasoning = ""
            continue
        if reasoning and message["role"] == "assistant":
            message["reasoning_content"], reasoning = reasoning, ""
        known.append(message)
    return known


def add_call(known: list[Known], item: CallItem, reasoning: str) -> None:
    """The calls of one answer, and its text before them, are one message."""
    call = call_of(item.call_id, item.name, arguments_of(item.arguments))
    if not known or known[-1]["role"] != "assistant" or reasoning:
        known.append({"role": "assistant", "content": ""})
        if reasoning:
            known[-1]["reasoning_content"] = reasoning
    known[-1].setdefault("tool_calls", []).append(call)


def text_of(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def beginnings(known: list[dict[str, Any]]) -> list[list[Known]]:
    """The conversation, and what is left of it as it is cut at the beginnings of later turns; the shortest is last.

    What is said by the system stays.
    """
    turns = [i for i, message in enumerate(known) if message["role"] == "user"]
    return [
        known,
        *([message for j, message in enumerate(known) if j >= i or message["role"] == "system"] for i in turns[1:]),
    ]
