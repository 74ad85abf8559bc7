from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from dsc_serve.bench.compare.command import peer_model_command
from dsc_serve.bench.compare.peer_model import FORMS, describe_foreign, peer_config, peer_counts, tensor_shapes
from dsc_serve.bench.load.made_up_tokenizer import made_up_tokens, save_tokenizer
from dsc_serve.model.decoder import parameter_counts
from dsc_serve.model.huggingface import import_huggingface
from dsc_serve.model.initial import preset_config
from dsc_serve.text.tokenizer import Tokenizer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("preset", ["paper", "large"])
def test_a_peer_is_as_large_as_ours(form: str, preset: str) -> None:
    ours = preset_config(preset, FORMS[form])
    counts = peer_counts(peer_config(form, ours))
    for count, own in zip((counts["parameters"], counts["active"]), parameter_counts(ours), strict=True):
        assert isinstance(count, int)
        assert count == pytest.approx(own, rel=0.03)


def test_the_command_writes_a_model_that_the_ecosystem_knows(tmp_path: Path) -> None:
    result = CliRunner().invoke(peer_model_command, [str(tmp_path / "llama"), "--form", "llama"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "llama" / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(tensor_shapes(config))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    imported = import_huggingface(tmp_path / "llama", tmp_path / "ours")  # which checks every tensor of a Llama
    assert parameter_counts(imported)[0] == sum(tensor.numel() for tensor in tensors.values())


def test_a_mixtral_names_its_experts_as_the_ecosystem_does() -> None:
    config = peer_config("mixtral", preset_config("paper", "moe"))
    shapes = dict(tensor_shapes(config))
    size = config["intermediate_size"]
    assert config["num_local_experts"] == 5 and config["num_experts_per_tok"] == 2 and size == 352
    assert shapes["model.layers.5.block_sparse_moe.gate.weight"] == (5, 384)
    assert shapes["model.layers.0.block_sparse_moe.experts.4.w2.weight"] == (384, size)


def test_the_made_up_tokenizer_has_every_id_and_gives_texts_back(tmp_path: Path) -> None:
    save_tokenizer(5000, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None and tokenizer.vocab_size == 5000 and tokenizer.eos_token_id == 0
    for text in ("hello wide world", "Über 12 Äcker, \n\t  x", "你好"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" a bb cc")) == 3
    tokens = [token for token, _ in made_up_tokens(4999)]
    assert len(set(tokens)) == 4999
    known = set()
    for token, pair in made_up_tokens(4999):
        assert pair is None or set(pair) <= known, "a merge joins tokens that are there"
        known.add(token)


def test_models_of_other_servers_are_described_as_far_as_their_files_say(tmp_path: Path) -> None:
    config = peer_config("llama", preset_config("paper", "dense"))
    counts = peer_counts(config)
    bare = {name: value for name, value in config.items() if name not in ("head_dim", "tie_word_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(bare), encoding="utf-8")
    assert isinstance(counts["parameters"], int)
    described = describe_foreign(tmp_path)
    assert described["parameters"] == described["active"] == counts["parameters"] + 50304 * 384, (
        "an output head of its own"
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert describe_foreign(tmp_path) == {"frame": f"{tmp_path.name}, 0 MB stored"}
    file = tmp_path / "smollm2.gguf"
    file.write_bytes(bytes(3 * 10**6))
    assert describe_foreign(file) == {"frame": "smollm2.gguf, 3 MB stored"}
    assert describe_foreign(tmp_path / "missing") == {"frame": ""}
