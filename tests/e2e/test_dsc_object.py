"""Routing and timings from a real engine: those of the reference script, and those of the client's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from openai import OpenAI
from support.running_server import RunningServer
from torch import Tensor


def test_a_trace_is_the_reference_script_s(
    golden_server: RunningServer, golden_io: Callable[[str], dict[str, Tensor]]
) -> None:
    io = golden_io("dsc")
    prompt = io["input_ids"][0].tolist()
    answer = golden_server.post("/v1/dsc/trace", prompt=prompt).json()
    routing = answer["dsc"]["routing"]
    assert (routing["start"], routing["token_ids"]) == (0, prompt)
    assert answer["usage"]["completion_tokens"] == 0
    coefficients, signal = np.array(routing["coefficients"]), np.array(routing["signal"])
    for layer in range(coefficients.shape[1]):
        tokens = slice(0, len(prompt))
        np.testing.assert_allclose(coefficients[:, layer], io[f"blocks.{layer}.ffn.coefficients"][tokens], atol=1e-5)
        np.testing.assert_allclose(signal[:, layer], io[f"blocks.{layer}.ffn.signal"][tokens, 0], rtol=1e-4)


def test_a_generation_picks_what_a_trace_of_its_text_picks(golden_server: RunningServer) -> None:
    body = {"prompt": [1, 2, 3, 4], "max_tokens": 9, "seed": 1, "dsc": {"return_routing": True, "top_k_atoms": 1}}
    choice = golden_server.post("/v1/completions", **body).json()["choices"][0]
    own = choice["dsc"]["routing"]
    whole = golden_server.post("/v1/dsc/trace", prompt=[1, 2, 3, 4, *choice["token_ids"][:-1]], top_k_atoms=1)
    traced = whole.json()["dsc"]["routing"]
    assert own["token_ids"] == traced["token_ids"]
    np.testing.assert_allclose(own["signal"], traced["signal"], rtol=1e-3)
    assert (np.array(own["atoms"]) == np.array(traced["atoms"])).mean() > 0.9  # near-ties may fall either way


def test_the_official_client_passes_the_object_on_and_shows_it(tiny: RunningServer) -> None:
    with OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        start = time.perf_counter()
        stream = client.chat.completions.create(
            model="dsc-tiny",
            messages=[{"role": "user", "content": "Once upon a time"}],
            max_tokens=20,
            stream=True,
            extra_body={"dsc": {"return_routing": True, "deadline_ms": 60000}, "ignore_eos": True},
        )
        chunks = [choice.model_extra for chunk in stream for choice in chunk.choices]
        passed_ms = 1e3 * (time.perf_counter() - start)
    told = [extra["dsc"] for extra in chunks if extra and "dsc" in extra]
    parts = [dsc["routing"] for dsc in told if "routing" in dsc]
    assert all(len(part["atoms"]) == len(part["token_ids"]) for part in parts)
    starts = [part["start"] for part in parts]
    assert starts == [sum(len(part["token_ids"]) for part in parts[:i]) for i in range(len(parts))]
    timings = told[-1]["timings"]
    assert 0 <= timings["queue_ms"] <= timings["ttft_ms"] <= passed_ms
    assert 0 < timings["mean_itl_ms"] <= timings["max_itl_ms"]
    assert timings["ttft_ms"] + 19 * timings["mean_itl_ms"] <= passed_ms
