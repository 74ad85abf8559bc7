"""Choices that a seed repeats, and vectors, by a running server."""

from __future__ import annotations

import base64

import numpy as np
from support.running_server import RunningServer

from dsc_serve.llm import LLM


def test_a_seed_repeats_its_choices_whole_and_streamed(tiny: RunningServer) -> None:
    body = {"prompt": "The President of the United States", "n": 5, "seed": 9, "max_tokens": 8, "temperature": 1.2}
    answers = [tiny.post("/v1/completions", **body).json()["choices"] for _ in range(4)]
    texts = [[choice["text"] for choice in choices] for choices in answers]
    assert all(each == texts[0] for each in texts) and len(set(texts[0])) > 1
    alone = tiny.post("/v1/completions", **{**body, "n": 1}).json()["choices"][0]["text"]
    assert alone == texts[0][0]
    tiny.wait_until(tiny.idle)
    assert tiny.metric("dsc_serve_permits_held") == 0


def test_vectors_are_those_of_the_python_api(tiny: RunningServer) -> None:
    texts = ["The President", "A dog", "The President of the United States " * 9]
    with LLM(threads=1) as llm:
        expected = llm.embed(texts).numpy()
    whole = tiny.post("/v1/embeddings", input=texts).json()
    np.testing.assert_allclose([entry["embedding"] for entry in whole["data"]], expected, atol=1e-4)
    packed = tiny.post("/v1/embeddings", input=texts, encoding_format="base64", dimensions=16).json()["data"]
    vectors = np.array([np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in packed])
    assert vectors.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
