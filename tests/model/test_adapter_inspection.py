"""What `adapter inspect` tells is what dense algebra gives, and what it writes is an adapter again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.adapters import adapter_folder, adapter_tensors
from support.families import family_folder

from dsc_kernels.weights import LowRank
from dsc_serve.cli import main
from dsc_serve.model.canonical import canonical
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.peft import read_adapter


@pytest.mark.parametrize(("rank", "out", "into"), [(4, 30, 17), (7, 5, 40), (40, 12, 9), (1, 6, 6)])
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_the_canonical_form_is_that_of_a_dense_decomposition(rank: int, out: int, into: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    down, up = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
    form = canonical(LowRank(down, up, scale))
    dense = scale * up.double() @ down.double()
    sigma = torch.linalg.svdvals(dense)
    count = min(len(sigma), len(form.sigma))
    assert torch.allclose(form.sigma[:count], sigma[:count], atol=1e-10 * float(sigma[0]))
    assert (form.u * form.sigma) @ form.v == pytest.approx(dense, abs=1e-10 * float(sigma[0]))
    for atoms in range(1, rank + 2):
        kept_down, kept_up = form.kept(atoms)
        left = dense - kept_up.double() @ kept_down.double()
        assert float(torch.linalg.matrix_norm(left, 2)) == pytest.approx(
            form.left_out(atoms), abs=1e-5 * float(sigma[0])
        )


def run(*words: str) -> str:
    result = CliRunner().invoke(main, ["adapter", "inspect", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_it_tells_modules_ranks_bytes_and_norms(tmp_path: Path) -> None:
    folder = adapter_folder("qwen3 by patterns", tmp_path / "tenant")
    text = run(str(folder))
    size = sum(tensor.nbytes for tensor in adapter_tensors("qwen3 by patterns").values())
    assert "modules   12, ranks 2, 4, 5, 7" in text
    assert f"bytes     {size:,} in memory" in text
    tensors = adapter_tensors("qwen3 by patterns")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    norm = 11 / 7 * torch.linalg.matrix_norm(tensors[name.format("B")] @ tensors[name.format("A")], 2)
    assert "q_proj: 3 modules" in text and f"median {float(norm):.4g}" in text
    assert "leave out" not in text and "fits" not in text


def test_it_checks_the_base_that_is_named(tmp_path: Path) -> None:
    folder = adapter_folder("phi3 fused", tmp_path / "tenant")
    base = family_folder("phi3", tmp_path / "phi3")
    source = open_source(base)
    digest = read_adapter(folder, source.config, source.origin).digest
    assert f"21 modules of it, digest {digest}" in run(str(folder), "--base", str(base))
    other = family_folder("qwen3", tmp_path / "qwen3")
    result = CliRunner().invoke(main, ["adapter", "inspect", str(folder), "--base", str(other)])
    assert result.exit_code == 1
    assert "matches nothing in the base model" in result.output


def test_the_strongest_atoms_are_an_adapter_again(tmp_path: Path) -> None:
    folder = adapter_folder("granite all linear", tmp_path / "tenant")
    source = open_source(family_folder("granite", tmp_path / "base"))
    whole = read_adapter(folder, source.config, source.origin)
    text = run(str(folder), "--atoms", "2", "--out", str(tmp_path / "kept"))
    assert "the 2 strongest atoms of each module leave out exactly" in text
    kept = read_adapter(tmp_path / "kept", source.config, source.origin)
    assert kept.rank == 2 and whole.rank == 4
    for key, own in whole.modules.items():
        small = kept.modules[key]
        dense = own.scale * own.up.double() @ own.down.double()
        left = dense - small.scale * small.up.double() @ small.down.double()
        norm = float(torch.linalg.matrix_norm(left, 2))
        assert norm == pytest.approx(float(torch.linalg.svdvals(dense)[2]), rel=1e-4)


@pytest.mark.parametrize("case", ["vblora", "vblora kept mixtures", "gpt2"])
def test_every_form_is_told(case: str, tmp_path: Path) -> None:
    folder = adapter_folder(case, tmp_path / "tenant")
    text = run(str(folder), "--atoms", "1", "--out", str(tmp_path / "kept"))
    assert text.startswith(f"form      {'VBLORA' if 'vblora' in case else 'LORA'}, for the base '{case}'")
    base = "gpt2" if case == "gpt2" else "qwen3"
    source = open_source(family_folder(base, tmp_path / "base"))
    assert read_adapter(tmp_path / "kept", source.config, source.origin).rank == 1


@pytest.mark.parametrize(("case", "part"), [("gpt2", "A"), ("gpt2", "B"), ("vblora", "A"), ("vblora", "B")])
def test_matrices_without_numbers_are_named(case: str, part: str, tmp_path: Path) -> None:
    tensors = adapter_tensors(case)
    name = next(own for own in tensors if own.split(".")[-1 if case == "vblora" else -2].endswith(f"_{part}"))
    shape = list(tensors[name].shape)
    shape[0 if part == "B" else 1] = 0
    tensors[name] = torch.zeros(shape)
    folder = adapter_folder(case, tmp_path / "tenant", tensors)
    result = CliRunner().invoke(main, ["adapter", "inspect", str(folder)])
    assert result.exit_code == 1
    assert result.output.endswith(f"tensor {name} has shape {shape}; it holds no numbers\n")


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    folder = adapter_folder("gpt2", tmp_path / "tenant", use_dora=True)
    result = CliRunner().invoke(main, ["adapter", "inspect", str(folder)])
    assert result.exit_code == 1
    assert (
        result.output
        == f"Error: {folder}: use_dora is True: DoRA rescales the base's columns; merge it into the base\n"
    )
    result = CliRunner().invoke(main, ["adapter", "inspect", str(folder), "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
