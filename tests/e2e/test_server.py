"""Promises of the whole server: its processes, bad input, clients that leave, and load."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from support.running_server import RunningServer, cpu_seconds, start_server, stop_server
from torch import Tensor

from dsc_kernels import ops
from dsc_serve.model.checkpoint import load_model
from dsc_serve.model.decoder import dsc_layers


def test_the_api_process_has_no_torch_and_the_engine_has(tiny: RunningServer) -> None:
    maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (tiny.pid, tiny.engine_pid)}
    assert "libtorch" not in maps[tiny.pid]
    assert "libtorch" in maps[tiny.engine_pid]


def test_it_says_where_it_is_and_how_to_try_it(tiny: RunningServer) -> None:
    text = "".join(tiny.log)
    assert "dsc-tiny" in text and "kernels: " in text
    command = next(line for line in tiny.log if line.startswith("curl "))
    body = json.loads(command.split("-d '")[1].rstrip("'\n"))
    assert tiny.post("/v1/completions", **body).json()["choices"][0]["text"]


def test_the_kernels_that_the_environment_asks_for_serve(tiny: RunningServer) -> None:
    asked = os.environ.get("DSC_SERVE__KERNELS", "auto")
    name = {"auto": ops.description(), "plain": "plain torch"}.get(asked, f"native C++ ({asked})")
    assert any(f"kernels: {name}" in line for line in tiny.log)


def test_the_bank_is_resident_once(golden_server: RunningServer, golden_folder: Callable[[str], Path]) -> None:
    model = load_model(golden_folder("dsc"), "float32", torch.device("cpu"))
    size = sum(t.numel() * 4 for layer in dsc_layers(model) for t in (layer.u, layer.v))
    assert golden_server.metric('dsc_serve_bank_resident_bytes{device="cpu"}') == size


def test_golden_greedy_ids_over_http(
    golden_server: RunningServer, golden_io: Callable[[str], dict[str, Tensor]]
) -> None:
    greedy = golden_io("dsc")["greedy_ids"].tolist()
    half = len(greedy[0]) // 2
    body = {"prompt": [row[:half] for row in greedy], "max_tokens": half, "temperature": 0}
    choices = golden_server.post("/v1/completions", **body).json()["choices"]
    assert [c["token_ids"] for c in choices] == [row[half:] for row in greedy]
    with httpx.stream(
        "POST", golden_server.url + "/v1/completions", json={**body, "stream": True}, timeout=60
    ) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    streamed: dict[int, list[int]] = {}
    for event in events:
        for choice in event["choices"]:
            assert choice["text"] == ""
            streamed.setdefault(choice["index"], []).extend(choice.get("token_ids", []))
    assert [streamed[i] for i in range(len(greedy))] == [row[half:] for row in greedy]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": [1, 2], "temperature": -1}, 400, ["temperature", "-1"]),
        ({"prompt": [1, 2], "max_tokens": "5"}, 400, ["max_tokens"]),
        ({"prompt": [1, 2], "frobnicate": 1}, 400, ["frobnicate"]),
        ({"prompt": [1] * 33}, 400, ["prompt", "33", "32"]),
        ({"prompt": [1] * 20, "max_tokens": 20}, 400, ["max_tokens", "20", "32"]),
        ({"prompt": [1, 131]}, 400, ["prompt", "131", "130"]),
        ({"prompt": []}, 400, ["prompt"]),
        ({"prompt": "text"}, 400, ["tokenizer"]),
        ({"prompt": [1], "stop": "x"}, 400, ["stop", "tokenizer"]),
        ({"prompt": [1], "model": "gpt-nope"}, 404, ["gpt-nope"]),
    ],
    ids=str,
)
def test_bad_requests_are_told_what_is_wrong(
    golden_server: RunningServer, body: dict[str, object], status: int, words: list[str]
) -> None:
    response = golden_server.post("/v1/completions", **body)
    assert response.status_code == status
    message = response.json()["error"]["message"]
    assert all(word in message for word in words), message


def test_broken_json_is_told(golden_server: RunningServer) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(golden_server.url + "/v1/completions", content=b'{"prompt": [1', headers=headers, timeout=60)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_a_prompt_over_the_kv_pool_is_refused(golden_folder: Callable[[str], Path]) -> None:
    server = start_server(str(golden_folder("dsc")), "--kv-tokens", "16", "--block-size", "4")
    try:
        response = server.post("/v1/completions", prompt=[1] * 17, max_tokens=1)
        assert response.status_code == 400
        assert "the KV pool holds 16" in response.json()["error"]["message"]
        assert server.post("/v1/completions", prompt=[1] * 8, max_tokens=8).status_code == 200
    finally:
        assert stop_server(server) == 0


def damaged(folder: Path, tmp_path: Path, size: int) -> Path:
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    return copy


def test_what_cannot_be_served_is_one_line_and_an_exit_status(
    golden_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    broken = damaged(golden_folder("dsc"), tmp_path, 5000)
    for arguments, words in [
        (["no-such-model"], "neither a folder, a file nor an embedded model"),
        ([str(broken)], "model.safetensors: not a readable safetensors file"),
        ([str(golden_folder("dsc")), "--max-running", "600"], "step_tokens is 512 but max_running is 600"),
        ([str(golden_folder("dsc")), "--kernels", "abacus"], "kernels 'abacus' are not available"),
    ]:
        result = subprocess.run(
            [sys.executable, "-m", "dsc_serve.cli", "serve", *arguments, "--port", "0"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 1
        assert words in result.stderr
        assert "Traceback" not in result.stderr


def test_the_engine_takes_no_modules_from_the_working_directory(
    golden_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('taken from the working directory')\n")
    arguments = ["serve", str(golden_folder("dsc").resolve()), "--kernels", "abacus", "--port", "0"]
    command = [sys.executable, "-P", "-m", "dsc_serve.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 1
    assert "kernels 'abacus' are not available" in result.stderr


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_request(tiny: RunningServer, stream: bool) -> None:
    body = {"prompt": "On and on", "max_tokens": 900, "ignore_eos": True, "stream": stream}
    before = tiny.metric("dsc_serve_engine_steps_total")
    with httpx.Client(timeout=60) as client:
        if stream:
            with client.stream("POST", tiny.url + "/v1/completions", json=body) as response:
                events = response.iter_lines()
                next(events)
                assert tiny.metric("dsc_serve_requests_running") == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(tiny.url + "/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.3))
    tiny.wait_until(tiny.idle)
    assert tiny.metric("dsc_serve_engine_steps_total") - before < 800, "it ran on to its end"


def test_the_api_stays_responsive_while_the_engine_computes(tiny: RunningServer) -> None:
    body = {"prompt": "word " * 300, "max_tokens": 150, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:
        load = [pool.submit(tiny.post, "/v1/completions", **body) for _ in range(8)]
        times = []
        while not all(f.done() for f in load):
            start = time.monotonic()
            assert tiny.get("/health").status_code == 200
            times.append(time.monotonic() - start)
            time.sleep(0.02)
        assert all(f.result().status_code == 200 for f in load)
    assert statistics.median(times) < 0.25


def test_two_idle_servers_use_no_processor(tiny: RunningServer, golden_server: RunningServer) -> None:
    servers = (tiny, golden_server)
    for server in servers:
        server.wait_until(server.idle)
    time.sleep(0.5)
    pids = [pid for server in servers for pid in (server.engine_pid, server.pid)]
    before = [cpu_seconds(pid) for pid in pids]
    time.sleep(5)
    used = [(cpu_seconds(pid) - start) / 5 for pid, start in zip(pids, before, strict=True)]
    assert max(used[::2]) < 0.01, "an engine"
    assert sum(used) < 0.04, "all together: signs of life, which a busy machine makes dearer"


def churn(server: RunningServer, seconds: float, streams: int = 64) -> tuple[int, int]:
    """Concurrent streams for a while, a third of them dropped at a random moment: completed, aborted."""
    end = time.monotonic() + seconds
    counts = [0, 0]
    lock = threading.Lock()
    failures: list[str] = []

    def one(seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < end and not failures:
                drop_after = rng.randrange(1, 25) if rng.random() < 0.33 else None
                body = {
                    "prompt": "The " * rng.randrange(1, 120),
                    "max_tokens": rng.randrange(1, 40),
                    "temperature": rng.choice([0, 0.8]),
                    "top_p": rng.choice([1, 0.9]),
                    "seed": rng.randrange(100),
                    "n": rng.choice([1, 1, 2]),
                    "stop": rng.choice([None, "the", "\n\n"]),
                    "stream": True,
                }
                lines = 0
                with client.stream("POST", server.url + "/v1/completions", json=body) as response:
                    if response.status_code == 429:  # places of those who left are taken back a moment later
                        time.sleep(0.1)
                        continue
                    if response.status_code != 200:
                        failures.append(response.read().decode())
                        return
                    last = ""
                    for line in response.iter_lines():
                        last, lines = line or last, lines + 1
                        if '"error"' in line:
                            failures.append(line)
                        if lines == drop_after:
                            break
                done = last == "data: [DONE]"
                with lock:
                    counts[0 if done else 1] += 1
                if not done and drop_after is None:
                    failures.append(f"a stream ended with {last!r}")

    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(one, range(streams)))
    assert not failures, failures[:3]
    return counts[0], counts[1]


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.full)])
def test_streams_and_random_aborts_leave_nothing_behind(tiny: RunningServer, seconds: float) -> None:
    lines = len(tiny.log)
    completed, aborted = churn(tiny, seconds)
    assert completed > 20 and aborted > 5
    tiny.wait_until(tiny.idle)
    assert tiny.metric('dsc_serve_kv_blocks{state="used"}') == 0
    assert tiny.metric("dsc_serve_permits_held") == 0
    assert tiny.metric("dsc_serve_invariant_repairs_total") == 0
    assert tiny.log[lines:] == []


def test_the_engine_does_not_outlive_a_killed_server(golden_folder: Callable[[str], Path]) -> None:
    server = start_server(str(golden_folder("dsc")))
    engine = server.engine_pid
    server.process.kill()
    server.process.wait(60)
    server.wait_until(lambda: not Path(f"/proc/{engine}").exists() or "Z" in state(engine))


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
