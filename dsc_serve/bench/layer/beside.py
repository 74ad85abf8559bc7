"""The native layer of a mixture of many experts beside that of the paper's sizes: how near each is to its roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsc_serve.bench.layer.measurement import LayerBench, LayerResult, LayerRow, quotient, run_layer_bench
from dsc_serve.bench.layer.table import cell

NATIVE_MOE = ("moe", "native")
PAPER = "paper"  # the sizes to compare with


@dataclass(frozen=True)
class ShareBeside:
    """Shares of the roofline at one batch size; None where a result was wrong, or there are no native kernels."""

    batch: int
    share: float | None  # of the mixture
    paper: float | None  # of the paper's mixture of 5 experts
    ratio: float | None


@dataclass(frozen=True)
class Beside:
    paper: LayerResult[LayerRow]
    shares: list[ShareBeside]

    def to_dict(self) -> dict[str, object]:
        return {"paper": self.paper.to_dict(), "shares": [asdict(share) for share in self.shares]}


def beside_of(kept: Mapping[str, Any]) -> Beside:
    """What `Beside.to_dict` made, again."""
    paper = LayerResult[LayerRow](**kept["paper"])
    paper.rows = [LayerRow(**row) for row in kept["paper"]["rows"]]
    return Beside(paper, [ShareBeside(**share) for share in kept["shares"]])


def beside_paper(result: LayerResult[LayerRow], bench: LayerBench, report: Callable[[str], None]) -> Beside:
    """Measure the paper's native mixture, as `bench` did another one: the same batches, dtype and threads."""
    report("the paper's sizes, for comparison")
    paper = run_layer_bench(replace(bench, config=PAPER, layers=None, only=NATIVE_MOE), result.command, report)
    ours, theirs = shares_of(result), shares_of(paper)
    found = [(batch, ours.get(batch), theirs.get(batch)) for batch in bench.batches]
    return Beside(paper, [ShareBeside(*three, quotient(three[1], three[2])) for three in found])


def shares_of(result: LayerResult[LayerRow]) -> dict[int, float | None]:
    """By batch size."""
    return {row.batch: row.roofline_share for row in result.rows if (row.system, row.path) == NATIVE_MOE}


def format_beside(beside: Beside, name: str) -> str:
    lines = ["", "share of the roofline of the native moe, beside that at the paper's sizes"]
    lines.append(f"{'B':<18}" + "".join(f"{share.batch:>9}" for share in beside.shares))
    for title, field in ((name, "share"), ("paper", "paper"), (f"{name} / paper", "ratio")):
        lines.append(f"{title:<18}" + "".join(cell(getattr(share, field), ".2f") for share in beside.shares))
    wrong = [row for row in beside.paper.rows if row.wrong]
    return "\n".join([*lines, *(f"WRONG: paper {row.system} at batch {row.batch}: {row.wrong}" for row in wrong)])
