"""What a DSC layer costs against its number of atoms, or of picks: time and bytes of router, bank and static part."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_kernels import ops, reference
from dsc_kernels.weights import FfnOptions, MlpWeights
from dsc_serve.bench.layer.measurement import (
    RATE_SECONDS,
    Group,
    LayerBench,
    LayerResult,
    LayerRow,
    Measured,
    begin,
    finish,
    interleaved_medians,
    layer_rows,
    rotation_layers,
    with_threads,
)
from dsc_serve.bench.layer.roofline import Rates, phases, stored_bytes
from dsc_serve.bench.layer.systems import (
    Layer,
    LayerSystem,
    Weights,
    build_system,
    layer_config,
    random_input,
    random_weights,
)
from dsc_serve.bench.layer.timing import timer_for
from dsc_serve.model.config import DscConfig, ModelConfig

ATOMS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
PICKS = (1, 2, 4, 8, 16, 32, 64)
SWEEPS: dict[str, list[tuple[int, int]]] = {  # points (M, K)
    "atoms": [(atoms, 4) for atoms in ATOMS],
    "picks": [(4096, picks) for picks in PICKS],
}
SWEEP_BATCHES = (1, 16)


@dataclass(frozen=True)
class SweepRow(LayerRow):
    """A row of one point of the sweep."""

    atoms: int
    picks: int
    router_us: float  # of the router's product, measured alone
    static_us: float  # of the static MLP, measured alone
    # the rest of the layer, which is norm, selection, coefficients and composition. It is below zero where the parts
    # run faster together
    bank_us: float | None
    router_bytes: int
    static_bytes: int
    bank_bytes: int


def sweep_config(name: str, atoms: int, picks: int) -> ModelConfig:
    config = layer_config(name, "dsc")
    assert isinstance(config.ffn, DscConfig)
    return config.model_copy(
        update={"ffn": config.ffn.model_copy(update={"num_atoms": atoms, "atoms_per_token": picks})}
    )


def router_alone(weights: Weights, dtype: torch.dtype, device: torch.device, native: bool) -> Layer:
    """The router's product to float32 logits, in the dtype in which the layer's path does it."""
    folded, bias = reference.fold_router_norm(
        *(weights[f"router{name}"].double() for name in (".weight", ".bias", "_norm.weight", "_norm.bias"))
    )
    product = ops.linear(folded.to(device, dtype if native else torch.float32), bias.float().to(device))
    if native:
        return lambda x: product(x, out_dtype=torch.float32)
    return lambda x: product(x.float())


def static_alone(weights: Weights, device: torch.device) -> Layer:
    up, down = (weights[f"static.{name}_proj.weight"].to(device, copy=True) for name in ("up", "down"))
    return ops.ffn(MlpWeights(up, None, down), FfnOptions(activation="gelu"))


def run_sweep(
    bench: LayerBench, sweep: str, command: str = "", report: Callable[[str], None] = lambda line: None
) -> LayerResult[SweepRow]:
    """Measure the DSC layer at every point of SWEEPS[sweep]; bench.seconds bounds a point at one batch size."""
    with with_threads(bench.threads):
        return _measure(bench, SWEEPS[sweep], command, report)


def _measure(
    bench: LayerBench, points: Sequence[tuple[int, int]], command: str, report: Callable[[str], None]
) -> LayerResult[SweepRow]:
    device, dtype = bench.torch_device, bench.torch_dtype
    result: LayerResult[SweepRow] = begin(command, device)
    rates, rows = Rates(), list[SweepRow]()
    for atoms, picks in points:
        report(f"M {atoms}, K {picks}")
        config = sweep_config(bench.config, atoms, picks)
        touched = sum(phase.bytes for phase in phases(config, 1, picks, dtype.itemsize))
        layers = bench.layers or rotation_layers(touched, device, least=2)
        weights = [random_weights(config, bench.seed + i, dtype) for i in range(layers)]
        system, path = build_system(config, "native", weights, dtype, device), "native"
        if system is None:
            system, path = build_system(config, "plain", weights, dtype, device), "plain"
        assert system is not None
        group = Group(config, [system], weights, stored_bytes(weights))
        parts = [
            LayerSystem("dsc", "router", [router_alone(w, dtype, device, path == "native") for w in weights]),
            LayerSystem("dsc", "static", [static_alone(w, device) for w in weights]),
        ]
        rates.measure([group.rotated], config.hidden_size, dtype, device, RATE_SECONDS)
        for batch in bench.batches:
            x = random_input(batch, config.hidden_size, bench.seed + batch, dtype, device)
            rows.append(_row(bench, group, parts, x, rates))
    result.notes.append("bank = all but the router's product and the static MLP: norm, selection and composition")
    result.notes.append("weights are random, so routing is uniform; inputs are normal, as a layer norm leaves them")
    result.rows = rows
    finish(result, rates)
    return result


def _row(bench: LayerBench, group: Group, parts: Sequence[LayerSystem], x: Tensor, rates: Rates) -> SweepRow:
    [(system, checked, layer)] = group.measure(x, bench.torch_dtype)
    shuffle, timer = random.Random(bench.seed).shuffle, timer_for(x.device)
    timed = [*parts, system] if checked.wrong is None else list(parts)
    router, static, *whole = interleaved_medians(timed, x, bench.repeats, bench.seconds, timer, shuffle)
    seconds = whole[0] if whole else None
    item = Measured(system.name, x.shape[0], seconds, checked, layer, group.rotated)
    [row] = layer_rows(bench, [item], rates)
    config = group.config.ffn
    assert isinstance(config, DscConfig)
    parts_bytes = {phase.name: round(phase.bytes) for phase in layer}
    return SweepRow(
        **vars(row),
        atoms=config.num_atoms,
        picks=config.atoms_per_token,
        router_us=router * 1e6,
        static_us=static * 1e6,
        bank_us=None if seconds is None else (seconds - router - static) * 1e6,
        router_bytes=parts_bytes["router"],
        static_bytes=parts_bytes["static"],
        bank_bytes=parts_bytes["bank"],
    )
