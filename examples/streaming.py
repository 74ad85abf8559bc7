"""Read a completion token by token with OpenAI's client: `python examples/streaming.py [URL]`."""

from __future__ import annotations

import sys

from openai import OpenAI


def main(url: str = "http://127.0.0.1:8000") -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")  # any text, unless the server asks for keys
    stream = client.completions.create(
        model=client.models.list().data[0].id,
        prompt="Once upon a time",
        max_tokens=32,
        temperature=0.7,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        if event.choices:  # the last event has usage alone
            print(event.choices[0].text, end="", flush=True)
        elif event.usage:
            print(f"\n[{event.usage.prompt_tokens} tokens in, {event.usage.completion_tokens} out]")


if __name__ == "__main__":
    main(*sys.argv[1:])
