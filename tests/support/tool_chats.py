"""Chats with tools of a server around a fake engine, and a template that shows which tools reached it."""

from __future__ import annotations

import re
from typing import Any

import httpx

from dsc_serve.text.chat import ChatTemplate
from dsc_serve.text.tokenizer import Tokenizer
from support.fake_engine import FakeEngine

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
HERMES = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }} {% endfor %}]<tool_call></tool_call>{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}<assistant>"
)
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TWO = f'{CALLED}\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>'
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]


def templated(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer._backend, eos_token_id=256, chat_template=ChatTemplate(template, {}))


def prompt_of(engine: FakeEngine, i: int = 0) -> str:
    return bytes(engine.submitted[i][1]).decode()


def message_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    for call in message["tool_calls"]:
        assert call.keys() == {"id", "type", "function"} and call["type"] == "function"
        assert re.fullmatch(r"call_\w{24}", call["id"])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
