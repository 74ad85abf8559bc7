"""Models as people have them: split, big-endian, lengthened, not quite what their names say."""

from __future__ import annotations

import logging
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from support.foreign import PROMPT, YARN, folder_of, huggingface_folder
from support.small_models import small_config, wide_tensors
from test_import_gguf import byte_level_vocabulary, config, write
from test_import_huggingface import expected_tensors
from torch import Tensor

from dsc_serve import LLM
from dsc_serve.model import rope
from dsc_serve.model.checkpoint import load_model, open_source, save_checkpoint
from dsc_serve.model.config import CheckpointError, load_config
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.gguf import import_gguf
from dsc_serve.model.huggingface import import_huggingface
from dsc_serve.model.rope import RopeTable
from dsc_serve.model.source import Stored
from dsc_serve.text.tokenizer import Tokenizer

CPU = torch.device("cpu")


def logits_of(path: Path, **settings: Any) -> Tensor:
    with LLM(str(path), dtype="float32", **settings) as llm:
        return llm.logits([PROMPT])[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), byte_level_vocabulary())
    return tmp_path / "m.gguf"


# --- as they are, and imported


def test_a_file_as_it_is_equals_its_import(file: Path, tmp_path: Path) -> None:
    import_gguf(file, tmp_path / "out", torch.float32)
    assert torch.equal(logits_of(file), logits_of(tmp_path / "out"))
    assert not torch.equal(logits_of(file, weights="stored"), logits_of(file))  # whose inputs are rounded to 8 bits
    assert open_source(file).config == load_config(tmp_path / "out")
    ours, theirs = Tokenizer.load(file), Tokenizer.load(tmp_path / "out")
    assert ours is not None and theirs is not None
    text = "Hello, wörld 42! <start>Hell<end>"
    assert ours.encode(text) == theirs.encode(text)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.chat_template is not None and theirs.chat_template is not None
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.chat_template.render(messages) == theirs.chat_template.render(messages)


def test_a_folder_as_it_is_equals_its_import(tmp_path: Path) -> None:
    folder = folder_of("rope_scaling beside rope_parameters", tmp_path / "model")
    import_huggingface(folder, tmp_path / "out")
    assert torch.equal(logits_of(folder), logits_of(tmp_path / "out"))


def test_the_tokenizer_of_a_file_needs_neither_torch_nor_a_second_file(file: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from dsc_serve.text.tokenizer import Tokenizer; "
        "print(Tokenizer.load(Path(sys.argv[1])).encode('Hello'), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True).stdout
    assert out == f"{Tokenizer.load(file).encode('Hello')} False\n"  # type: ignore[union-attr]
    assert list(file.parent.iterdir()) == [file]


def test_weights_do_not_exist_together_while_they_are_loaded(tmp_path: Path) -> None:
    """Of the tensors that are read, those of one layer are alive at a time, beside the embedding."""
    model = config(num_hidden_layers=12)
    write(tmp_path / "m.gguf", wide_tensors(model), model, byte_level_vocabulary())
    source, alive, most = open_source(tmp_path / "m.gguf"), 0, 0

    def watched(own: Stored) -> Stored:
        def read() -> Tensor:
            nonlocal alive, most
            tensor = own.read()
            size = tensor.numel()

            def gone() -> None:
                nonlocal alive
                alive -= size

            weakref.finalize(tensor, gone)
            alive += size
            most = max(most, alive)
            return tensor

        return replace(own, read=read)

    source = replace(source, tensors={name: watched(own) for name, own in source.tensors.items()})
    sizes = {name: torch.Size(own.shape).numel() for name, own in source.tensors.items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    kept = sizes["model.embed_tokens.weight"] + sum(size for name, size in sizes.items() if "norm" in name)
    decoder = Decoder(source.config, source.weights(), torch.bfloat16, CPU)  # so that whatever is kept is a copy
    assert len(decoder.layers) == 12
    assert 0 < most <= layer + kept


def test_what_is_loaded_does_not_follow_its_file(tmp_path: Path) -> None:
    save_checkpoint(small_config("dsc"), wide_tensors(small_config("dsc")), tmp_path / "m")
    with LLM(str(tmp_path / "m"), dtype="float32") as llm:
        before = llm.logits([PROMPT])[0]
        weights = tmp_path / "m" / "model.safetensors"
        with weights.open("r+b") as stream:
            stream.seek(4096)
            stream.write(b"\x7f" * (weights.stat().st_size - 4096))
        assert torch.equal(llm.logits([PROMPT])[0], before)


def test_progress_is_shown_where_loading_takes_long(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(file, "float32", CPU)
    assert "loading" not in capfd.readouterr().err
    monkeypatch.setattr("dsc_serve.model.source.SILENT_S", 0.0)
    monkeypatch.setattr("dsc_serve.model.source.APART_S", 0.0)
    load_model(file, "float32", CPU)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(open_source(file).tensors)
    assert lines[-1] == "loading m.gguf: 100%"


def test_a_folder_without_a_model_type_is_known_by_its_architecture(tmp_path: Path) -> None:
    folder = huggingface_folder(tmp_path / "m", expected_tensors(), model_type=None)
    assert open_source(folder).config.mlp_gated


def test_scaling_by_kinds_of_layers_is_read(tmp_path: Path) -> None:
    nested = {"full_attention": {**YARN, "rope_theta": 700.0}, "sliding_attention": {"rope_type": "default"}}
    found = open_source(huggingface_folder(tmp_path / "m", expected_tensors(), rope_parameters=nested)).config
    assert found.rope_theta == 700.0 and found.rope_scaling is not None and found.rope_scaling.rope_type == "yarn"


def test_a_head_that_is_the_embedding_in_another_dtype_is_tied(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in expected_tensors().items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()
    found = open_source(huggingface_folder(tmp_path / "m", tensors, tie_word_embeddings=True))
    assert found.config.tie_word_embeddings and "lm_head.weight" not in found.tensors


# --- GGUF


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_big_endian_file_gives_the_same(architecture: str, tmp_path: Path) -> None:
    model = config(attention_bias=architecture == "qwen2")
    for name, order in (("little", gguf.GGUFEndian.LITTLE), ("big", gguf.GGUFEndian.BIG)):
        (tmp_path / name).mkdir()
        tensors, words = wide_tensors(model), byte_level_vocabulary()
        write(tmp_path / name / "m.gguf", tensors, model, words, architecture, quantised=False, endianess=order)
    little, big = (tmp_path / name / "m.gguf" for name in ("little", "big"))
    assert big.read_bytes() != little.read_bytes()
    assert torch.equal(logits_of(big), logits_of(little))
    assert Tokenizer.load(big).encode("Hello") == Tokenizer.load(little).encode("Hello")  # type: ignore[union-attr]


def split(tmp_path: Path) -> list[Path]:
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), byte_level_vocabulary(), split_max_tensors=6)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_a_split_file_is_served_by_any_of_its_parts(file: Path, tmp_path: Path) -> None:
    whole = logits_of(file)
    (tmp_path / "parts").mkdir()
    parts = split(tmp_path / "parts")
    assert len(parts) > 2
    for part in (parts[0], parts[-1]):
        assert torch.equal(logits_of(part), whole)
    assert Tokenizer.load(parts[1]).encode("Hello") == Tokenizer.load(file).encode("Hello")  # type: ignore[union-attr]


def test_parts_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=rf"{parts[0].name}: one of .*, of which {parts[1].name} is missing"):
        open_source(parts[0])
    (tmp_path / parts[1].name).write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=rf"{parts[1].name}: its header does not say that it is part 2"):
        open_source(parts[0])
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"renamed\.gguf: one of \d parts of a split file; expected a name that"):
        open_source(tmp_path / "renamed.gguf")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("adapter", "general.type is 'adapter'; supported: 'model'; an adapter is no model"),
        ("imatrix", "is 'imatrix'; s"),
    ],
)
def test_files_that_are_no_models_are_told(kind: str, message: str, tmp_path: Path) -> None:
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: writer.add_type(kind)  # noqa: E731
    write(tmp_path / "m.gguf", wide_tensors(config()), config(), byte_level_vocabulary(), change=change)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "m.gguf")


# --- contexts


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 96),
        ({"rope_type": "linear", "factor": 2.5}, 120),
        (YARN, 64),
        ({"rope_type": "yarn", "factor": 4.0}, 192),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}, 48),
        ({"rope_type": "dynamic", "factor": 4.0}, 48),
        ({"rope_type": "default"}, 48),
    ],
    ids=str,
)
def test_linear_scaling_and_yarn_lengthen_the_context(scaling: dict[str, Any], context: int, tmp_path: Path) -> None:
    folder = huggingface_folder(tmp_path / "m", expected_tensors(), rope_scaling=scaling)
    with LLM(str(folder)) as llm:
        assert llm.engine.capacity.max_model_len == context
    with LLM(str(folder), context=40) as llm:
        assert llm.engine.capacity.max_model_len == 40


def test_yarn_lengthens_the_context_of_a_file(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(20)

    write(tmp_path / "m.gguf", wide_tensors(config()), config(), byte_level_vocabulary(), change=change)
    assert open_source(tmp_path / "m.gguf").config.max_position_embeddings == 80


def test_a_longer_context_is_served_knowingly(
    tmp_path: Path, small_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = huggingface_folder(tmp_path / "m", expected_tensors())
    with caplog.at_level(logging.WARNING), LLM(str(folder), dtype="float32", context=100) as llm:
        assert llm.engine.capacity.max_model_len == 100
        assert len(llm.logits([[1] * 100])[0]) == 100
    assert "context is 100; the model is for 48" in caplog.text
    learned = small_model("dense", position_embedding_type="learned")
    with pytest.raises(CheckpointError, match="context is 49; the model has learned 48 positions"):
        LLM(str(learned), context=49)
    with LLM(str(learned), context=10) as llm:
        assert llm.engine.capacity.max_model_len == 10
    dynamic = huggingface_folder(tmp_path / "d", expected_tensors(), rope_scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(CheckpointError, match="context is 49; with dynamic scaling of positions at most 48 are served"):
        LLM(str(dynamic), context=49)


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def test_angles_take_memory_as_contexts_need_them() -> None:
    before = resident_mb()
    table = RopeTable(128, 1_024_000, 1e6)
    table.reach(3000)
    assert resident_mb() - before < 40  # all of it would take 524 MB, and half as much four times over to compute
    table.reach(9000)
    expected = rope.rope_table(128, 9000, 1e6)
    assert table.filled >= 9000
    assert torch.equal(table.table[:9000], expected)


def test_angles_are_there_when_a_step_needs_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = logits_of(folder_of("plain", tmp_path / "m"))
    monkeypatch.setattr(rope, "AHEAD", 4)
    for settings in ({"step_tokens": 7, "max_running": 2}, {"kernels": "plain"}):
        torch.testing.assert_close(logits_of(tmp_path / "m", **settings), whole, atol=1e-4, rtol=1e-4)
