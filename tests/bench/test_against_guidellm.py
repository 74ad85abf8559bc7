"""The load generator beside guidellm, a kept tool, on one server whose times are known: both must see them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsc_serve.bench.load.generator import LoadConfig, run_load
from dsc_serve.bench.load.made_up_tokenizer import save_tokenizer

PROMPT, OUTPUT, STREAMS, REQUESTS = 48, 64, 4, 24
FIRST_S, NEXT_S = 0.1, 0.02
FIGURES = {  # ours, guidellm's and what makes milliseconds of it; its "inter token latency" is a mean over a request
    "median_ttft_ms": ("time_to_first_token_ms", 1),
    "median_tpot_ms": ("inter_token_latency_ms", 1),
    "median_e2el_ms": ("request_latency", 1e3),
}
GUIDELLM = os.environ.get("GUIDELLM") or shutil.which("guidellm")

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(600),
    pytest.mark.skipif(GUIDELLM is None, reason="guidellm is not installed; GUIDELLM names its program"),
]


async def paced(exchange: Any) -> None:
    """64 tokens by the clock, however busy the machine is."""
    begun = time.perf_counter()
    await asyncio.sleep(FIRST_S)
    await exchange.begin()
    for i in range(OUTPUT):
        await asyncio.sleep(begun + FIRST_S + i * NEXT_S - time.perf_counter())
        await exchange.token()
    await exchange.end(completion_tokens=OUTPUT)


def by_guidellm(url: str, folder: Path, out: Path) -> dict[str, float]:
    assert GUIDELLM is not None
    save_tokenizer(50304, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    command = [GUIDELLM, "run", "--disable-console", "--output", f"kind=json,path={out}"]
    command += ["--backend", f"kind=openai_http,target={url},request_format=/v1/completions,validate_backend=false"]
    command += ["--profile", f"kind=concurrent,streams={STREAMS}"]
    command += ["--constraint", f"kind=max_requests,count={REQUESTS}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"]
    command += ["--tokenizer", f"kind=hf_auto,model={folder}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, timeout=300, capture_output=True, env=environment | {"HF_HUB_OFFLINE": "1"})
    metrics = json.loads(out.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    assert metrics["request_totals"]["successful"] == REQUESTS
    return {ours: metrics[name]["successful"]["median"] * unit for ours, (name, unit) in FIGURES.items()}


def by_us(url: str) -> dict[str, float]:
    load = LoadConfig(url=url, concurrency=STREAMS, requests=REQUESTS, prompt_tokens=PROMPT, output_tokens=OUTPUT)
    flat = run_load(load).to_dict()
    assert flat["completed"] == REQUESTS
    return {figure: float(str(flat[figure])) for figure in FIGURES}


def test_medians_agree_within_a_twentieth(serve: Callable[..., Any], tmp_path: Path) -> None:
    server = serve(paced)
    theirs, ours = by_guidellm(server.url, tmp_path, tmp_path / "guidellm.json"), by_us(server.url)
    for figure in FIGURES:
        print(f"{figure}: ours {ours[figure]:.2f}, guidellm {theirs[figure]:.2f}")
    assert ours == pytest.approx(theirs, rel=0.05)
