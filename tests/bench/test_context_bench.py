"""`bench context`: what contexts take is what their blocks take, and windows keep what they see alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from dsc_serve.cli import main
from dsc_serve.config import EMBEDDED_MODEL


def test_every_model_is_measured_with_every_form(small_model: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    full = small_model("dense", max_position_embeddings=200)
    windowed = small_model("dense", max_position_embeddings=200, window=16)
    options = ["--context", "100", "--streams", "2", "--steps", "2", "--rounds", "3", "--threads", "1"]
    forms = ["--kv-dtype", "auto", "--kv-dtype", "int8"]
    done = CliRunner().invoke(
        main, ["bench", "context", str(full), str(windowed), *options, *forms, "--json", str(file)]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_bytes())["rows"]
    assert [(row["model"], row["kv_dtype"]) for row in rows] == [
        (folder.name, form) for folder in (full, windowed) for form in ("auto", "int8")
    ]
    wide, narrow, seen, _ = rows
    assert wide["token_bytes"] == seen["token_bytes"] > narrow["token_bytes"]
    assert wide["held_bytes"] >= 100 * wide["token_bytes"] > 2 * seen["held_bytes"] > 2 * 16 * seen["token_bytes"]
    assert rows[0]["ratio"] == 1 and all(row["lowest"] <= row["ratio"] <= row["highest"] for row in rows)
    assert f"| {windowed.name} | int8 | 2 | 100 |" in done.output


def test_a_text_is_read_in_windows_of_the_context(tmp_path: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("A server loads a model, and tokens that picked the same atoms are computed together.\n")
    options = ["--context", "20", "--steps", "1", "--rounds", "1", "--threads", "1", "--dtype", "float32"]
    words = ["bench", "context", EMBEDDED_MODEL, "--kv-dtype", "auto", "--kv-dtype", "int8", *options]
    done = CliRunner().invoke(main, [*words, "--text", str(text), "--json", str(file)])
    assert done.exit_code == 0, done.output
    full, narrow = (row["bits_per_byte"] for row in json.loads(file.read_bytes())["rows"])
    assert full != narrow and abs(narrow / full - 1) < 0.02
    assert f"| {full:.4f} |" in done.output and "bits per byte" in done.output
    text.write_text("a")
    done = CliRunner().invoke(main, [*words, "--text", str(text)])
    assert done.exit_code == 1 and "--text: the text has 1 tokens" in done.output


def test_what_the_context_does_not_hold_is_refused(small_model: Callable[..., Path]) -> None:
    done = CliRunner().invoke(main, ["bench", "context", str(small_model())])
    assert done.exit_code != 0 and "need 4287 tokens; the context of" in done.output
