"""The layer benchmark's results for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsc_serve.bench.layer.measurement import LayerResult, LayerRow, Row
from dsc_serve.bench.layer.sweep import SweepRow
from dsc_serve.bench.plot import Point, line_chart

TABLES: list[tuple[str, Callable[[LayerRow], float | None], str]] = [
    ("microseconds per layer", lambda row: row.us, ".0f"),
    ("time / that of the best MoE path", lambda row: row.ratio_to_best_moe, ".2f"),
    ("time / that of the frozen plain MoE (moe sorted)", lambda row: row.ratio_to_plain_moe, ".2f"),
    ("share of the roofline, phases and their reading and computing added up", lambda row: row.roofline_share, ".2f"),
    ("share of the roofline with reading and computing overlapped", lambda row: row.overlapped_share, ".2f"),
]


def cell(value: float | None, form: str, width: int = 9) -> str:
    return format("-" if value is None else format(value, form), f">{width}")


def head(result: LayerResult[Row]) -> list[str]:
    names = ("cpu", "device", "cores", "threads", "torch", "kernels", "load_before", "load_after")
    machine = ", ".join(f"{name.replace('_', ' ')} {result.machine[name]}" for name in names)
    return [result.command, f"{result.date}; {machine}", *result.notes, ceilings(result)]


def ceilings(result: LayerResult[Row]) -> str:
    """What the machine reads and multiplies at most, as measured."""
    bandwidth = result.roofline["read_bytes_per_s"]
    assert isinstance(bandwidth, dict)
    rates = ", ".join(f"{rate / 1e9:.1f} GB/s over {int(size) / 1e6:.0f} MB" for size, rate in bandwidth.items())
    gemm = float(str(result.roofline["gemm_flops_per_s"])) / 1e9
    return f"measured ceilings: reading {rates}; GEMM {gemm:.0f} GFLOP/s"


def wrong_lines(rows: Sequence[LayerRow]) -> list[str]:
    return [f"WRONG: {row.system} {row.path} at batch {row.batch}: {row.wrong}" for row in rows if row.wrong]


def format_layers(result: LayerResult[LayerRow]) -> str:
    """What measured it, and `layer_lines`."""
    return "\n".join([*head(result), *layer_lines(result)])


def layer_lines(result: LayerResult[LayerRow]) -> list[str]:
    """One table per figure: a line per system and path, a column per batch size."""
    batches = list(dict.fromkeys(row.batch for row in result.rows))
    by_name: dict[tuple[str, str], dict[int, LayerRow]] = {}
    for row in result.rows:
        by_name.setdefault((row.system, row.path), {})[row.batch] = row
    lines = []
    for title, value, form in TABLES:
        lines += ["", f"{title:<18}", f"{'B':<18}" + "".join(f"{batch:>9}" for batch in batches)]
        for (system, path), found in by_name.items():
            cells = "".join(cell(value(found[b]) if b in found else None, form) for b in batches)
            lines.append(f"{system + ' ' + path:<18}{cells}")
    return [*lines, *wrong_lines(result.rows)]


def format_sweep(result: LayerResult[SweepRow]) -> str:
    """What measured it, and `sweep_lines`."""
    return "\n".join([*head(result), *sweep_lines(result)])


def sweep_lines(result: LayerResult[SweepRow]) -> list[str]:
    """A line per point and batch size: time and bytes, in all and by part."""
    names = ("us", "router", "bank", "static", "kB", "router", "bank", "static", "share")
    lines = ["", f"{'B':>5}{'M':>7}{'K':>4}" + "".join(f"{name:>9}" for name in names)]
    for row in sorted(result.rows, key=lambda row: row.batch):
        times = (row.us, row.router_us, row.bank_us, row.static_us)
        kilobytes = (row.bytes / 1e3, row.router_bytes / 1e3, row.bank_bytes / 1e3, row.static_bytes / 1e3)
        cells = "".join(cell(value, ".0f") for value in (*times, *kilobytes)) + cell(row.roofline_share, ".2f")
        lines.append(f"{row.batch:>5}{row.atoms:>7}{row.picks:>4}{cells}")
    return [*lines, *wrong_lines(result.rows)]


def chart_layers(result: LayerResult[LayerRow]) -> str:
    """Time against batch size, as SVG."""
    series: dict[str, list[Point]] = {}
    for row in result.rows:
        if row.us is not None:
            series.setdefault(f"{row.system} {row.path}", []).append((row.batch, row.us))
    title = f"One FFN layer, {result.rows[0].dtype}, {result.machine['threads']} threads, {result.machine['cpu']}"
    return line_chart(title, "tokens in the batch", "microseconds per layer", series)


def chart_sweep(result: LayerResult[SweepRow], sweep: str) -> str:
    """Time against the swept size, as SVG."""
    series: dict[str, list[Point]] = {}
    for row in result.rows:
        if row.us is not None:
            series.setdefault(f"B={row.batch}", []).append((getattr(row, sweep), row.us))
    title = f"One DSC layer, {result.rows[0].dtype}, {result.machine['threads']} threads, {result.machine['cpu']}"
    return line_chart(title, f"{sweep} (M)" if sweep == "atoms" else f"{sweep} (K)", "microseconds per layer", series)
