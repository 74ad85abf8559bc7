"""A loop of tools: the model calls, this program answers, the model goes on: `python examples/tools.py [URL]`."""

from __future__ import annotations

import json
import sys
from typing import Any

from openai import OpenAI

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "population",
            "description": "How many people live in a city.",
            "strict": True,  # arguments follow the schema, whatever the model has learnt
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Paris", "Rome", "Vienna"]},
                    "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
PEOPLE = {"Paris": 2_103_000, "Rome": 2_755_000, "Vienna": 2_006_000}


def main(url: str = "http://127.0.0.1:8000") -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "How many people live in Rome?"}]
    answer = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=TOOLS,
        tool_choice="required",  # "auto" for a model that was taught to call
        parallel_tool_calls=False,
        max_tokens=100,
        seed=1,
    )
    message = answer.choices[0].message
    messages.append(message)
    for call in message.tool_calls or []:
        arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
        print("called:", call.function.name, arguments)  # type: ignore[union-attr]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"{PEOPLE[arguments['city']]:,}"})
    answer = client.chat.completions.create(
        model=model, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=16, seed=1
    )
    print("answered:", (answer.choices[0].message.content or "").strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
