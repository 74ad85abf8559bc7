"""Fixtures shared by all tests: the reference script's checkpoints in the serving form, and small random models."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from safetensors.torch import load_file
from support.small_models import DATA, small_config, wide_tensors
from torch import Tensor

from dsc_kernels import native, ops
from dsc_serve.model.checkpoint import save_checkpoint
from dsc_serve.model.reference import import_reference

settings.register_profile("repeatable", derandomize=True)  # the same examples in every run
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """Ten thousand collected tests are millions of objects: a full collection of garbage walked them all, and held a
    client of a running server for half a second in the middle of what it measured.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_kernels() -> Iterator[None]:
    """Which kernels serve is of the whole process: what a test chose is not the next one's."""
    before = kernels_in_use()
    yield
    if kernels_in_use() != before:
        chosen, active, router, head = before
        ops.use(chosen)
        native.use(active or "plain")
        native.use_router(router)
        native.use_head(head)


def kernels_in_use() -> tuple[str, str | None, native.RouterPrecision, native.HeadPrecision]:
    return ops.chosen(), native.active(), native.router_precision(), native.head_precision()


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint folder of one of the reference script's methods."""
    root = tmp_path_factory.mktemp("golden")

    def folder(method: str) -> Path:
        out = root / method
        if not out.exists():
            import_reference(DATA / f"{method}.weights.safetensors", DATA / f"{method}.config.json", out)
        return out

    return folder


@pytest.fixture(scope="session")
def golden_io() -> Callable[[str], dict[str, Tensor]]:
    """Inputs and outputs of the reference script on those weights."""
    return lambda method: load_file(DATA / f"{method}.io.safetensors")


@pytest.fixture
def small_model(tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint folder of a small random model: `small_model("moe", norm_type="rmsnorm")`."""

    def build(kind: str = "dsc", ffn: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> Path:
        config = small_config(kind, ffn, **changes)
        out = tmp_path / f"small-{len(list(tmp_path.iterdir()))}"
        save_checkpoint(config, wide_tensors(config, seed), out)
        return out

    return build
