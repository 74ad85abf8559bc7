"""LoRAs on a basis that they share: what is left out is told exactly, and what does not fit there keeps its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.made_adapters import dense
from torch import Tensor

from dsc_kernels.weights import Core, LowRank, Pair
from dsc_serve.cli import main
from dsc_serve.files import CheckpointError
from dsc_serve.model.adapter import Adapter
from dsc_serve.model.adapter_kinds import read_adapter
from dsc_serve.model.canonical import canonical
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.cores.files import basis_file, digest_of, read_basis, read_cores
from dsc_serve.model.cores.sharing import common_basis, core_of, left_out, projected
from dsc_serve.model.peft import write_adapter
from dsc_serve.model.peft.modules import Base
from dsc_serve.model.peft.tensors import Matrices


def update(seed: int, rank: int = 4, out: int = 30, into: int = 20, inside: Pair | None = None) -> LowRank:
    """Random, or of directions of a pair alone."""
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, into, generator=g), torch.randn(out, rank, generator=g)
    if inside is not None:
        down = torch.randn(rank, len(inside.down), generator=g) @ inside.down
        up = inside.up @ torch.randn(inside.up.shape[1], rank, generator=g)
    return LowRank(down, up, 0.5)


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.matrix_norm(tensor.double(), 2))


def approximation(pair: Pair, core: Tensor) -> Tensor:
    return pair.up.double() @ core.double() @ pair.down.double()


def test_adapters_of_common_directions_lose_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = Pair(torch.randn(6, 20, generator=g), torch.randn(30, 6, generator=g))
    adapters = {name: {"m": update(i, inside=hidden)} for i, name in enumerate("abcd")}
    pairs = common_basis(adapters, 6)
    assert [tuple(part.shape) for part in pairs["m"]] == [(6, 20), (30, 6)]
    for own in adapters.values():
        found = projected(own, pairs)
        assert found.certificate["m"].share < 1e-6
        torch.testing.assert_close(approximation(pairs["m"], found.cores["m"]), dense(own["m"]), rtol=1e-4, atol=1e-4)
    assert len(common_basis(adapters, 100)["m"].down) == 6, "directions of rounding alone are none"


@pytest.mark.parametrize("rank", [1, 5, 9])
@pytest.mark.parametrize("whitened", [False, True])
def test_what_is_told_to_be_left_out_is_what_dense_algebra_gives(rank: int, whitened: bool) -> None:
    adapters = {name: {"m": update(i)} for i, name in enumerate("abc")}
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(9)).double() * torch.arange(1, 21)
    moments = {"m": x.T @ x / len(x)} if whitened else None
    pairs = common_basis(adapters, rank, moments)
    for own in adapters.values():
        found = projected(own, pairs, None, moments)
        left = dense(own["m"]) - approximation(pairs["m"], found.cores["m"])
        assert found.certificate["m"].error == pytest.approx(norm(left), rel=1e-6)
        assert found.certificate["m"].norm == pytest.approx(norm(dense(own["m"])), rel=1e-6)
        assert 0.05 < found.certificate["m"].share <= 1.0001 or whitened


def test_no_core_on_the_same_pair_is_nearer() -> None:
    """In the Frobenius norm, which a sum of squares is least in; with moments, of outputs."""
    own, pairs = update(1), common_basis({"a": {"m": update(1)}, "b": {"m": update(2)}}, 3)
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(4)).double() * torch.arange(1, 21)
    moment = x.T @ x / len(x)
    for chosen, weigh in ((None, torch.eye(20).double()), (moment, x.T)):
        core = core_of("m", canonical(own), pairs["m"], chosen)
        best = float(((dense(own) - approximation(pairs["m"], core)) @ weigh).norm())
        g = torch.Generator().manual_seed(5)
        for _ in range(20):
            other = core + 0.01 * float(core.norm()) * torch.randn(core.shape, generator=g)
            assert float(((dense(own) - approximation(pairs["m"], other)) @ weigh).norm()) > 0.999 * best
    assert left_out(canonical(own), pairs["m"], torch.zeros(3, 3)) == pytest.approx(norm(dense(own)))


def test_whitening_is_nearer_on_such_inputs() -> None:
    adapters = {name: {"m": update(i)} for i, name in enumerate("abcdef")}
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(3)).double() * torch.arange(1, 21) ** 2
    moments = {"m": x.T @ x / len(x)}

    def output_error(chosen: dict[str, Tensor] | None) -> float:
        pairs = common_basis(adapters, 5, chosen)
        wrong = 0.0
        for own in adapters.values():
            core = projected(own, pairs, None, chosen).cores["m"]
            wrong += float(((dense(own["m"]) - approximation(pairs["m"], core)) @ x.T).square().sum())
        return wrong

    assert output_error(moments) < 0.9 * output_error(None)


def test_modules_beyond_the_error_keep_what_they_have() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = Pair(torch.randn(3, 20, generator=g), torch.randn(30, 3, generator=g))
    adapters = {name: {"near": update(i, inside=hidden), "far": update(i)} for i, name in enumerate("abcde")}
    pairs = common_basis(adapters, 3)
    found = projected(adapters["a"], pairs, 0.1)
    assert set(found.cores) == {"near"} and set(found.own) == {"far"}
    kept = found.own["far"]
    torch.testing.assert_close(kept.up @ kept.down, dense(adapters["a"]["far"]).float(), rtol=1e-4, atol=1e-4)
    assert found.certificate["far"].error == 0
    assert projected({"new": update(1)}, pairs).own.keys() == {"new"}, "the basis has nothing of it"


def test_what_cannot_share_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"module m is \[30, 20\] of 'a' and \[31, 20\] of 'b'"):
        common_basis({"a": {"m": update(1)}, "b": {"m": update(1, out=31)}}, 2)
    with pytest.raises(CheckpointError, match="all updates of the adapters are 0"):
        common_basis({"a": {"m": LowRank(torch.ones(2, 5), torch.zeros(6, 2))}}, 2)
    with pytest.raises(CheckpointError, match=r"module m is \[31, 20\]; the basis is of a base where it is \[30, 20\]"):
        projected({"m": update(1, out=31)}, common_basis({"a": {"m": update(1)}}, 2))


# --- the command ---


def write(folder: Path, base: Path, names: Sequence[str], rank: int = 3, hidden: int = 5, aligned: bool = True) -> None:
    """LoRAs of a base, of common directions or of none."""
    g = torch.Generator().manual_seed(7)
    modules = Base(open_source(base).config, None).modules.values()
    pairs = {
        own.name: Pair(torch.randn(hidden, own.into, generator=g), torch.randn(own.out, hidden, generator=g))
        for own in modules
    }
    for i, name in enumerate(names):
        made = {}
        for own in modules:
            one = update(100 * i + own.into, rank, own.out, own.into, pairs[own.name] if aligned else None)
            made[own.name] = Matrices(one.down / own.into**0.5, 0.1 * one.up)
        write_adapter(folder / name, "small", 2.0 * rank, made)


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(main, ["adapter", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: str | Path) -> str:
    result = CliRunner().invoke(main, ["adapter", *map(str, words)])
    assert result.exit_code in (1, 2), result.output
    return result.output


def spelt(adapter: Adapter) -> dict[tuple[int, str], Tensor]:
    assert adapter.basis is not None
    pairs = adapter.basis.pairs()
    return {
        place: approximation(pairs[place], own.matrix) if isinstance(own, Core) else dense(own)
        for place, own in adapter.modules.items()
    }


@pytest.fixture
def base(small_model: type) -> Path:
    return small_model("dense")  # type: ignore[no-any-return]


def test_adapters_are_shared_and_told(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "loras", base, "abc")
    folders, out = [tmp_path / "loras" / name for name in "abc"], tmp_path / "shared"
    text = run("share", *folders, "--rank", "5", "--out", out)
    (file,) = out.glob(".basis-*")
    assert f"basis     {file.name[7:23]}: 12 modules, rank 5" in text and "c: 12 modules on it; 1,200 bytes" in text
    config = open_source(base).config
    digests = set()
    for folder in folders:
        lora, own = read_adapter(folder, config), read_adapter(out / folder.name, config)
        assert (own.kind, own.rank, own.nbytes) == ("shared", 5, 12 * 5 * 5 * 4)
        for place, one in spelt(own).items():
            want = lora.modules[place]
            assert isinstance(want, LowRank)
            torch.testing.assert_close(one, dense(want), rtol=1e-4, atol=1e-5)
        digests |= {own.digest, lora.digest}
    assert len(digests) == 6
    told = run("inspect", out / "a", "--base", base)
    assert "form      shared, for the base 'small'" in told and "fits" in told
    for line in (
        f"basis     {file.name[7:23]}: 12 modules, rank 5",
        "modules   12, 12 on",
        "1,200 of its own",
        "error",
    ):
        assert line in told
    assert "left out of an update's norm 0.00% in the median" in told and "up_proj: 2 modules" in told
    assert run("inspect", out / "a", "--atoms", "3", "--out", tmp_path / "again")
    again, first = read_adapter(tmp_path / "again", config), read_adapter(folders[0], config)
    for place, one in again.modules.items():
        want = first.modules[place]
        assert isinstance(one, LowRank) and isinstance(want, LowRank)
        torch.testing.assert_close(dense(one), dense(want), rtol=1e-4, atol=1e-5)


def test_new_ones_are_projected_onto_a_basis(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "loras", base, "abcd")
    out = tmp_path / "shared"
    run("share", *(tmp_path / "loras" / name for name in "abc"), "--rank", "5", "--out", out)
    (file,) = out.glob(".basis-*")
    text = run("share", tmp_path / "loras" / "d", "--onto", out, "--out", out)
    assert "d: 12 modules on it" in text and "0.00% at most" in text
    assert list(out.glob(".basis-*")) == [file]
    run("share", tmp_path / "loras" / "d", "--onto", file, "--out", tmp_path / "elsewhere")
    assert read_basis(tmp_path / "elsewhere" / file.name).digest == read_basis(file).digest
    write(tmp_path / "others", base, "e", aligned=False)
    text = run("share", tmp_path / "others" / "e", "--onto", out, "--out", out)
    worst = float(text.split(" in the median, ")[1].split("%")[0])
    assert worst > 50, "who does not fit is told so"


def test_unaligned_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "loras", base, "abcdef", aligned=False)
    folders, out = [tmp_path / "loras" / name for name in "abcdef"], tmp_path / "shared"
    text = refused("share", *folders, "--rank", "4", "--max-error", "0.2", "--out", out)
    assert "adapter 'a' cannot stand on this basis: at least" in text and "max-error is 0.2; serve it as it is" in text
    assert not out.exists()
    text = run("share", *folders, "--rank", "4", "--out", out)
    assert "at most" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rank", "4", "--onto", "x"), "--onto"),
        ((), "--rank"),
        (("--rank", "4", "--whiten", "x.txt"), "--base"),
        (("--rank", "0"), "0 is not in the range"),
        (("--rank", "4", "--max-error", "-1"), "-1"),
    ],
)
def test_options_that_do_not_belong_together(words: tuple[str, ...], message: str, base: Path, tmp_path: Path) -> None:
    write(tmp_path / "loras", base, "a")
    assert message in refused("share", tmp_path / "loras" / "a", *words, "--out", tmp_path / "out")


def test_what_is_there_is_not_written_over(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "loras", base, "ab")
    folders, out = [tmp_path / "loras" / name for name in "ab"], tmp_path / "shared"
    run("share", *folders, "--rank", "2", "--out", out)
    assert "a: exists already" in refused("share", *folders, "--rank", "3", "--out", out)
    assert "another adapter is called 'a', too" in refused(
        "share", folders[0], folders[0], "--rank", "3", "--out", tmp_path / "x"
    )
    run("share", folders[1], "--rank", "1", "--out", tmp_path / "more")
    (file,) = (tmp_path / "more").glob(".basis-*")
    (out / file.name).write_bytes(file.read_bytes())
    assert "holds 2 bases" in refused("share", folders[0], "--onto", out, "--out", tmp_path / "y")
    assert "share one of their own" not in refused("share", out / "a", "--rank", "2", "--out", tmp_path / "z")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_adapters_whose_numbers_cannot_be_meant_are_named(number: float, base: Path, tmp_path: Path) -> None:
    write(tmp_path / "loras", base, "ab")
    file = tmp_path / "loras" / "b" / "adapter_model.safetensors"
    stored = load_file(file)
    name = next(own for own in stored if own.endswith("lora_B.weight"))
    stored[name][0, 1] = number
    save_file(stored, file, metadata={"format": "pt"})
    folders = [tmp_path / "loras" / own for own in "ab"]
    text = refused("share", *folders, "--rank", "4", "--out", tmp_path / "shared")
    assert name in text and "not finite" in text and not (tmp_path / "shared").exists()


def test_a_digest_is_of_names_shapes_and_numbers() -> None:
    pair = Pair(torch.ones(2, 3), torch.ones(4, 2))
    digest = digest_of({"a": pair})
    assert digest == digest_of({"a": Pair(torch.ones(2, 3), torch.ones(4, 2))})
    others = [{"b": pair}, {"a": Pair(torch.ones(3, 2), torch.ones(4, 2))}, {"a": Pair(pair.down * 2, pair.up)}]
    assert len({digest, *map(digest_of, others)}) == 4
    assert basis_file(digest) == f".basis-{digest[:16]}.safetensors"


def test_files_say_what_they_are(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "loras", base, "ab")
    out = tmp_path / "shared"
    run("share", tmp_path / "loras" / "a", tmp_path / "loras" / "b", "--rank", "2", "--out", out)
    own = read_cores(out / "a")
    (file,) = out.glob(".basis-*")
    basis = read_basis(file)
    assert (own.basis, own.kind, own.base) == (basis.digest, "shared", "small") == (own.basis, basis.kind, basis.base)
    assert set(own.certificate) == set(own.cores) == set(basis.modules)
