"""What is wrong with a checkpoint is said in one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_models import DATA, small_config, wide_tensors
from torch import Tensor

from dsc_kernels import native, ops
from dsc_serve import LLM
from dsc_serve.model import checkpoint
from dsc_serve.model.checkpoint import load_model, save_checkpoint
from dsc_serve.model.config import CheckpointError, load_config
from dsc_serve.model.reference import import_reference

CPU = torch.device("cpu")
NAME = "model.layers.1.mlp.router.weight"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


def poke(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"tensor {NAME} is missing"),
        (put("model.extra", torch.zeros(2)), "tensor model.extra does not belong"),
        (put(NAME, torch.zeros(37, 31)), rf"tensor {NAME} has shape \[37, 31\], expected \[37, 32\]"),
        (put(NAME, torch.zeros(37, 32, dtype=torch.int64)), f"tensor {NAME} is stored as int64, expected float32"),
        (poke(NAME, float("nan")), f"tensor {NAME} holds 1 values that are not finite"),
        (poke("model.norm.weight", float("inf")), "tensor model.norm.weight holds 1 values that are not finite"),
    ],
)
def test_bad_tensors(
    change: Callable[[dict[str, Tensor]], None], message: str, small_model: Callable[..., Path]
) -> None:
    folder = small_model()
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder, "float32", CPU)
    assert "\n" not in str(caught.value)


def test_truncated_and_missing_files(small_model: Callable[..., Path]) -> None:
    folder = small_model()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            load_model(folder, "float32", CPU)
    file.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(folder, "float32", CPU)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 0, "hidden_size"),
        ("hidden_size", "32", "hidden_size"),
        ("num_key_value_heads", 3, "num_key_value_heads, 3, does not divide"),
        ("head_dim", 7, "head_dim is 7; rope needs an even one"),
        ("head_dim", 0, "head_dim"),
        ("norm_type", "batch", "norm_type"),
        ("hiden_size", 32, "hiden_size"),
        ("model_type", "llama", "model_type"),
        ("ffn", {"kind": "dsc", "num_atoms": 2, "atoms_per_token": 3, "static_size": 8}, "more than num_atoms"),
        ("ffn", {"kind": "mlp"}, "ffn"),
        ("eos_token_id", 61, "eos_token_id is 61; allowed: 0 to 60"),
        ("eos_token_id", [3, -1], "eos_token_id is -1"),
        ("bos_token_id", 100, "bos_token_id is 100"),
    ],
)
def test_bad_config(field: str, value: Any, message: str, small_model: Callable[..., Path]) -> None:
    folder = small_model()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_config(folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_that_is_no_json(small_model: Callable[..., Path]) -> None:
    folder = small_model()
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        load_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        load_config(folder)


def test_generation_config_names_the_end_of_text(small_model: Callable[..., Path]) -> None:
    folder = small_model(eos_token_id=3)
    path = folder / "generation_config.json"
    assert load_config(folder).eos_token_ids == (3,)
    path.write_text('{"eos_token_id": [5, 6], "temperature": 0.6}')
    assert load_config(folder).eos_token_ids == (5, 6)
    path.write_text("{}")
    assert load_config(folder).eos_token_ids == (3,)
    path.write_text('{"eos_token_id": "end"}')
    with pytest.raises(CheckpointError, match="eos_token_id is 'end', expected a token id"):
        load_config(folder)


def test_a_checkpoint_is_never_written_over_another(small_model: Callable[..., Path]) -> None:
    folder = small_model()
    with pytest.raises(CheckpointError, match=r"holds a checkpoint already \(model\.safetensors\); name an"):
        save_checkpoint(small_config(), wide_tensors(small_config()), folder)


def test_projected_atoms_must_not_exceed_norm_one(tmp_path: Path) -> None:
    config = small_config(ffn={"atoms": "projected"})
    tensors = wide_tensors(config)
    for name in tensors:
        if "atoms" in name:
            tensors[name] = tensors[name] / tensors[name].norm(dim=1, keepdim=True)
    save_checkpoint(config, tensors, tmp_path / "good")
    load_model(tmp_path / "good", "float32", CPU)
    save_checkpoint(config, {k: v.bfloat16() for k, v in tensors.items()}, tmp_path / "rounded")
    load_model(tmp_path / "rounded", "bfloat16", CPU)
    tensors["model.layers.1.mlp.atoms_v"][5] *= 1.1
    save_checkpoint(config, tensors, tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.atoms_v: row 5 has norm 1\.1 after projection"):
        load_model(tmp_path / "bad", "float32", CPU)


def test_raw_and_projected_atoms_serve_alike(tmp_path: Path) -> None:
    raw, projected = small_config(), small_config(ffn={"atoms": "projected"})
    tensors = wide_tensors(raw)
    save_checkpoint(raw, tensors, tmp_path / "raw")
    for name in tensors:
        if "atoms" in name:
            tensors[name] = tensors[name] / tensors[name].norm(dim=1, keepdim=True)
    save_checkpoint(projected, tensors, tmp_path / "projected")
    ids = [[1, 2, 3, 4]]
    with LLM(str(tmp_path / "raw")) as a, LLM(str(tmp_path / "projected")) as b:
        torch.testing.assert_close(a.logits(ids), b.logits(ids), atol=1e-5, rtol=1e-5)


def test_sharded_checkpoint_equals_whole(small_model: Callable[..., Path]) -> None:
    folder = small_model()
    with LLM(str(folder)) as llm:
        want = llm.logits([[1, 2, 3]])
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    with LLM(str(folder)) as llm:
        torch.testing.assert_close(llm.logits([[1, 2, 3]]), want, atol=0, rtol=0)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: no such file"):
        load_model(folder, "auto", CPU)
    index.write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside the checkpoint's folder"):
        load_model(folder, "auto", CPU)


def test_reference_import_names_what_is_wrong(tmp_path: Path) -> None:
    weights, good = DATA / "dsc.weights.safetensors", json.loads((DATA / "dsc.config.json").read_text())
    config = tmp_path / "config.json"
    for field, value, message in [
        ("method", "other", "method is 'other'; supported: dsc, standard_moe, dense"),
        ("d_model", 50, "n_head, 3, does not divide"),
        ("num_bases", None, "num_bases is None, expected int"),
        ("num_bases", 81, r"atoms_u has shape \[80, 48\], expected \[81, 48\]"),
        ("tie_weights", 1, "tie_weights is 1, expected bool"),
        ("n_head", 96, "which n_head, 96, does not divide"),
        ("dmc_top_k", 81, "more than num_atoms, 80"),
        ("tau_clamp", 0, "tau"),
    ]:
        config.write_text(json.dumps({**good, field: value}))
        with pytest.raises(CheckpointError, match=message):
            import_reference(weights, config, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such file"):
        import_reference(tmp_path / "none.safetensors", DATA / "dsc.config.json", tmp_path / "out")


def test_a_state_dict_of_torchs_own_format_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: torch's own format; write its state dict as safetensors"):
        import_reference(tmp_path / "model.pt", DATA / "dsc.config.json", tmp_path / "out")


def test_a_state_dict_may_hold_the_tied_head_too(tmp_path: Path) -> None:
    stored = load_file(DATA / "dsc.weights.safetensors")
    stored["head.weight"] = stored["token_embedding.weight"]
    save_file({name: tensor.clone() for name, tensor in stored.items()}, tmp_path / "w.safetensors")
    for weights, out in ((DATA / "dsc.weights.safetensors", "a"), (tmp_path / "w.safetensors", "b")):
        import_reference(weights, DATA / "dsc.config.json", tmp_path / out)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_without_bfloat16_computes_in_float32(
    fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast or including_emulation)
    assert checkpoint.choose_dtype("auto", torch.bfloat16, torch.device("cuda")) == dtype


@pytest.mark.parametrize("kernels", ["plain", "baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_without_products_of_bfloat16_native_kernels_compute_in_it_and_torch_does_not(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native kernels widen it in registers, and read half of float32's bytes."""
    if kernels not in ("plain", *native.available()):
        pytest.skip(f"{kernels}: not on this machine")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    ops.use(kernels)
    expected = torch.float32 if kernels in ("plain", "baseline") else torch.bfloat16
    assert checkpoint.choose_dtype("auto", torch.bfloat16, CPU) == expected
    assert checkpoint.choose_dtype("auto", torch.float32, CPU) == torch.float32


@pytest.mark.parametrize(("fast", "dtype", "told"), [(True, torch.bfloat16, 1), (False, torch.float32, 0)])
def test_it_is_told_where_float16_is_rounded(
    fast: bool, dtype: torch.dtype, told: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint, "is_fast_in_bfloat16", lambda device: fast)
    assert checkpoint.choose_dtype("auto", torch.float16, CPU) == dtype
    assert checkpoint.choose_dtype("float32", torch.float16, CPU) == torch.float32
    checkpoint.choose_dtype("auto", torch.bfloat16, CPU)
    assert len(caplog.records) == told
