"""The messages of a chat as templates take them, with calls, their results and the tools."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from dsc_serve.server.tools import mistral
from dsc_serve.server.tools.dialect import Dialect
from dsc_serve.server.tools.fields import Tool
from dsc_serve.server.tools.form import tool_text

Known = dict[str, Any]
MISTRAL_ID = re.compile(rf"[A-Za-z0-9]{{{mistral.ID_SIZE}}}")


def for_template(messages: Sequence[Known], tools: Sequence[Tool], dialect: Dialect) -> tuple[list[Known], list[Known]]:
    """Messages and tools to render. Where the template knows no tools, texts of ours say what there is to say."""
    if dialect.renders_tools:
        if dialect.form.name == "mistral":
            messages = [with_short_ids(message) for message in messages]
        return list(messages), [rendered_tool(tool) for tool in tools]
    told = [as_text(message, dialect) for message in messages]
    if tools:
        first = told[0] if told[0]["role"] == "system" else None
        text = instructions(tools, dialect)
        if first is None:
            told.insert(0, {"role": "system", "content": text})
        else:
            told[0] = {**first, "content": f"{first['content']}\n\n{text}"}
    return told, []


def rendered_tool(tool: Tool) -> Known:
    function: Known = {"name": tool.name, "description": tool.description}
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def instructions(tools: Sequence[Tool], dialect: Dialect) -> str:
    listed = "\n".join(tool_text(tool.name, tool.description, tool.parameters) for tool in tools)
    example = dialect.form.written([("NAME", "{…}")])
    return f"You may call tools. A call is a line of its own, like this:\n{example}\nThe tools:\n{listed}"


def as_text(message: Known, dialect: Dialect) -> Known:
    """A message for a template that knows neither calls nor results."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"Result of {message['name']}:\n{message['content']}"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [call["function"] for call in calls]
    written = dialect.form.written([(each["name"], arguments_text(each["arguments"])) for each in functions])
    content = f"{message['content']}\n{written}" if message["content"] else written
    return {"role": message["role"], "content": content}


def call_of(name: str, function: str, arguments: object) -> Known:
    """A call as messages have it; name: its id."""
    return {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}


def arguments_text(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def arguments_of(text: str) -> object:
    """As an object where they are one. What a model wrote wrongly goes back to it as it was."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def with_short_ids(message: Known) -> Known:
    """Mistral's templates refuse ids of another form than its own, which other servers or clients have given."""
    changed = dict(message)
    if "tool_call_id" in changed:
        changed["tool_call_id"] = short_id(changed["tool_call_id"])
    if changed.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": short_id(call["id"])} for call in changed["tool_calls"]]
    return changed


def short_id(name: str) -> str:
    return name if MISTRAL_ID.fullmatch(name) else hashlib.blake2b(name.encode(), digest_size=5).hexdigest()[:9]
