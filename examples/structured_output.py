"""Answers of a given form, whatever the model has learnt: `python examples/structured_output.py [URL]`."""

from __future__ import annotations

import json
import sys

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "climate": {"enum": ["dry", "mild", "wet"]},
    },
    "required": ["city", "population", "climate"],
    "additionalProperties": False,
}


def main(url: str = "http://127.0.0.1:8000") -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Describe a city as JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
        max_tokens=120,  # strings and numbers have limits in the schema, so this always suffices
        seed=1,
    )
    print(json.loads(answer.choices[0].message.content or ""))
    date = client.completions.create(
        model=model,
        prompt="The war began on ",
        max_tokens=20,
        seed=1,
        extra_body={"structured_outputs": {"regex": r"1[0-9]{3}-[01][0-9]-[0-3][0-9]"}},  # vLLM's field
    )
    print(date.choices[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])
