"""Is it right: a server through OpenAI's client. Greedy texts as a CPU's in float32, streams, chat, many at once.

`http_check.py URL DEVICE`: the device on which the metrics must show the bank.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

base, device = sys.argv[1:]
want: dict[str, str] = json.loads(Path(__file__).with_name("expected.json").read_text(encoding="utf-8"))
client = OpenAI(base_url=f"{base}/v1", api_key="none", timeout=60)
model = client.models.list().data[0].id
wrong: list[str] = []


def check(name: str, right: bool, more: str = "") -> None:
    print("ok    " if right else "WRONG ", name, more, flush=True)
    if not right:
        wrong.append(name)


def complete(prompt: str, **more: object):
    return client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=48, **more)


for prompt, text in want.items():
    got = complete(prompt).choices[0].text
    check(f"greedy {prompt[:24]!r}", got == text, "" if got == text else f"got {got[:60]!r} want {text[:60]!r}")
first = next(iter(want))
streamed = "".join(part.choices[0].text for part in complete(first, stream=True) if part.choices)
check("stream", streamed == want[first])
chat = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Tell me a story."}],
    max_tokens=24,
    temperature=0.7,
    seed=3,
    logprobs=True,
    top_logprobs=3,
)
check("chat with log probabilities", bool(chat.choices[0].message.content) and bool(chat.choices[0].logprobs.content))
drawn = client.completions.create(
    model=model,
    prompt=first,
    n=4,
    max_tokens=16,
    temperature=0.9,
    top_p=0.8,
    frequency_penalty=0.3,
    logit_bias={"5": -2},
    seed=1,
)
check("four choices, filtered and penalised", len({choice.text for choice in drawn.choices}) > 1)
shaped = client.completions.create(
    model=model, prompt=first, max_tokens=24, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
)
check("structured output", shaped.choices[0].text in ("yes", "no"), repr(shaped.choices[0].text))
asked = [list(want)[number % len(want)] for number in range(32)]
with ThreadPoolExecutor(len(asked)) as pool:
    same = sum(pool.map(lambda prompt: complete(prompt).choices[0].text == want[prompt], asked))
check("32 at once give the same texts", same >= 31, f"{same} of 32")
metrics = urllib.request.urlopen(f"{base}/metrics", timeout=30).read().decode()
resident = [line for line in metrics.splitlines() if "bank_resident" in line and not line.startswith("#")]
on_device = any(f'device="{device}"' in line and float(line.split()[-1]) > 0 for line in resident)
check(f"the bank lies on {device}", on_device, "; ".join(resident))
print("http:", f"WRONG: {wrong}" if wrong else "OK")
sys.exit(bool(wrong))
