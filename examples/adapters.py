"""One answer of the base, of each adapter and of all together: `python examples/adapters.py [URL]`."""

from __future__ import annotations

import sys

from openai import OpenAI

PROMPT = "Once upon a time"


def main(url: str = "http://127.0.0.1:8000") -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    base, *adapters = (model.id for model in client.models.list())
    for name in (base, *adapters):
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0)
        print(f"{answer.model}: {answer.choices[0].text!r}")
    if adapters:
        together = {"adapters": {name: 1 / len(adapters) for name in adapters}}
        answer = client.completions.create(
            model=base, prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"dsc": together}
        )
        print(f"{answer.model}: {answer.choices[0].text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
