"""`bench context`: what contexts take is what their blocks take, and windows keep what they see alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from dsc_serve.cli import main


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


def test_what_the_context_does_not_hold_is_refused(small_model: Callable[..., Path]) -> None:
    done = CliRunner().invoke(main, ["bench", "context", str(small_model())])
    assert done.exit_code != 0 and "need 4287 tokens; the context of" in done.output
