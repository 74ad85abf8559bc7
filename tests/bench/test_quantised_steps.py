"""`bench quantised`: every form and another program at every number of streams, and what the other end does wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsc_serve.bench.step import llama_peer
from dsc_serve.bench.step.llama_peer import Peer, PeerError, answer
from dsc_serve.bench.step.quantised import ratios
from dsc_serve.cli import main

ECHO = """
import json, sys
asked = []
for line in sys.stdin:
    asked.append(json.loads(line))
    do = asked[-1]["do"]
    streams = next((one["streams"] for one in reversed(asked) if one["do"] == "begin"), 0)
    said = {"steps": {"ms": [100.0 * streams] * asked[-1].get("count", 0)}, "prompt": {"ms": 7000.0}}.get(do, {})
    print(json.dumps(said), flush=True)
"""
OPTIONS = [
    "--steps",
    "2",
    "--rounds",
    "3",
    "--threads",
    "1",
    "--prompt-tokens",
    "20",
    "--streams",
    "1",
    "--streams",
    "3",
]


def test_every_form_is_measured_beside_the_first_and_another_program(
    small_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Peer.__init__, "__defaults__", ((sys.executable, "-c", ECHO),))
    folder, file = small_model("dense", max_position_embeddings=200), tmp_path / "found.json"
    forms = ["--weights", "bfloat16", "--weights", "int8", "--llama-cpp"]
    done = CliRunner().invoke(main, ["bench", "quantised", str(folder), *forms, *OPTIONS, "--json", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_bytes())
    systems = ["bfloat16", "int8", "llama.cpp"]
    assert [(row["system"], row["streams"]) for row in found["steps"]] == [
        (name, n) for n in (1, 3) for name in systems
    ]
    assert [row["system"] for row in found["prompts"]] == systems
    for row in [*found["steps"], *found["prompts"]]:
        assert row["lowest"] <= row["ratio"] <= row["highest"]
        assert row["system"] != "bfloat16" or row["ratio"] == 1
    theirs = [row for row in found["steps"] if row["system"] == "llama.cpp"]
    assert [row["step_ms"] for row in theirs] == [100, 300] and [row["tokens_per_s"] for row in theirs] == [10, 10]
    assert all((row["read_ratio"] is None) == (row["system"] == "llama.cpp") for row in found["steps"])
    assert found["bytes"]["int8"] < found["bytes"]["bfloat16"]
    assert "| llama.cpp | 3 | 300.000 |" in done.output and "| llama.cpp | 20 | 7000.0 |" in done.output
    assert "| llama.cpp | 10.0 | 10.0 |" in done.output
    for row in [*found["steps"], *found["prompts"]]:  # one step or prompt of theirs takes what it says, in every round
        theirs_ms = 7000.0 if "ms" in row else 100.0 * row["streams"]
        assert row["peer_ratio"] == pytest.approx((row.get("ms") or row["step_ms"]) / theirs_ms)
    times = [1 / row["peer_ratio"] for row in found["steps"] if row["system"] == "int8"]
    assert f"| int8, times llama.cpp's | {times[0]:.2f} | {times[1]:.2f} |" in done.output


def test_an_embedding_of_its_own_is_not_among_the_bytes(small_model: Callable[..., Path], tmp_path: Path) -> None:
    sizes = []
    for tied in (True, False):
        folder = small_model("dense", max_position_embeddings=200, tie_word_embeddings=tied)
        file = tmp_path / f"{tied}.json"
        words = ["bench", "quantised", str(folder), "--weights", "bfloat16", *OPTIONS, "--json", str(file)]
        assert CliRunner().invoke(main, words).exit_code == 0
        sizes.append(json.loads(file.read_bytes())["bytes"]["bfloat16"])
    assert sizes[0] == sizes[1] > 0


def test_what_the_context_does_not_hold_is_refused(small_model: Callable[..., Path]) -> None:
    done = CliRunner().invoke(main, ["bench", "quantised", str(small_model("dense"))])
    assert done.exit_code != 0 and "need 1001 tokens; the context of" in done.output


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('print(\'{"error": "no such file"}\')', "llama.cpp: no such file"),
        ("raise SystemExit(3)", "llama.cpp: it ended with status 3"),
    ],
)
def test_what_goes_wrong_at_the_other_end_is_said(script: str, message: str) -> None:
    with pytest.raises(PeerError, match=message):
        Peer(Path("m.gguf"), 1, 8, 1, (sys.executable, "-c", script))


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    script = "import sys; sys.modules['llama_cpp'] = None; from dsc_serve.bench.step.llama_peer import serve; serve()"
    with pytest.raises(PeerError, match="the package llama_cpp is missing: pip install llama-cpp-python"):
        Peer(tmp_path / "m.gguf", 1, 8, 1, (sys.executable, "-c", script))


class Recorder:
    """What a command calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def begin(self, streams: int, prompt_tokens: int) -> None:
        self.calls.append(("begin", streams, prompt_tokens))

    def step(self) -> float:
        self.calls.append(("step",))
        return 2.0

    def prompt(self, tokens: int) -> float:
        self.calls.append(("prompt", tokens))
        return 5.0


def test_commands_are_the_calls_that_they_name() -> None:
    own = Recorder()
    for command, said in [
        ({"do": "begin", "streams": 2, "prompt_tokens": 4}, {}),
        ({"do": "steps", "count": 2}, {"ms": [2.0, 2.0]}),
        ({"do": "prompt", "tokens": 9}, {"ms": 5.0}),
    ]:
        assert answer(own, command) == (own, said)  # type: ignore[arg-type]
    assert own.calls == [("begin", 2, 4), ("step",), ("step",), ("prompt", 9)]
    assert llama_peer.UBATCH == 512


def test_ratios_are_those_of_rounds() -> None:
    found = ratios([[1.0, 2.0], [2.0, 6.0], [4.0, 4.0]], 1)
    assert (found.median, found.lowest, found.highest) == (2, 1, 3)


@pytest.mark.full
def test_llama_cpp_decodes(small_model: Callable[..., Path], tmp_path: Path) -> None:
    """Where the package is installed."""
    pytest.importorskip("llama_cpp", reason="the package llama_cpp is missing: pip install llama-cpp-python")
    from support.family_files import family_file

    file = family_file("llama", tmp_path)
    with Peer(file, 2, 32, 1) as peer:
        peer.begin(2, 8)
        assert all(ms > 0 for ms in peer.steps(3)) and peer.prompt(16) > 0
        peer.begin(1, 4)
        assert len(peer.steps(2)) == 2
    with pytest.raises(PeerError, match="cannot be loaded"):
        Peer(tmp_path / "none.gguf", 1, 8, 1)
