"""The report of a study of adapters, from results that are made up: tables, and sentences that rules make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsc_serve.train.adaptation_study.findings import findings
from dsc_serve.train.adaptation_study.report import BEGIN, END, check_document, report, write_into
from dsc_serve.train.settings import TrainError

TEXTS = ("bible", "henry")


def kind(title: str, rows: dict[str, tuple[float, float]], size: int, shared: int = 0) -> dict[str, Any]:
    bits = {name: dict(zip(TEXTS, row, strict=True)) for name, row in rows.items()}
    told = {"title": title, "tenant_bytes": size, "shared_bytes": shared, "steps": 10, "tokens": 2000}
    return {**told, "training_seconds": 61.5, "dtype": "float32", "bits": bits}


def result(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "command": "dsc-serve adapter study --base smol --text FOLDER --out RUNS",
        "version": "0.1.0",
        "date": "2026-11-29",
        "machine": "a processor",
        "threads": 2,
        "base": {"name": "smol", "layers": 2, "width": 32, "vocabulary": 320},
        "options": {"tokens": 1000, "length": 256},
        "texts": {name: {"training_tokens": 9, "held_out_tokens": 512 + i} for i, name in enumerate(TEXTS)},
        "missing": [],
        "base_bits": {"bible": 1.0, "henry": 2.0},
        "kinds": {
            "lora": kind("LoRA", {"bible": (0.9, 1.95), "henry": (0.95, 1.8)}, 1600),
            "shared": kind("cores on a shared basis", {"bible": (0.96, 1.9), "henry": (0.95, 1.92)}, 80, 900),
            "mixed": kind("one LoRA of all texts", {"mixed": (0.94, 1.88)}, 0, 1600),
            "lora-r1": kind("LoRA of rank 1", {"bible": (0.912, 2.0), "henry": (1.0, 1.824)}, 100),
        },
        "equal_bytes": {"shared": "lora-r1"},
        "certificates": {
            "bible": {"median_share": 0.5, "largest_share": 0.9, "largest_error": 1.25},
            "henry": {"median_share": 0.7, "largest_share": 0.8, "largest_error": 0.5},
        },
        "refusal": {
            "adapters": 8, "rank": 16, "basis": 32, "max_error": 0.5,
            "left_out": [0.8, 0.9, 1.0], "refused": True, "said": "adapter 'random-0' cannot stand on this basis",
        },
    }  # fmt: skip
    return {**made, **changes}


def test_the_sentences_follow_from_the_figures() -> None:
    assert list(findings(result())) == [
        "At equal training tokens LoRA is best on the tenants' own texts: −10.0 % bits per byte against the base "
        "in the mean.",
        "One LoRA of all texts together gives −6.0 %: so much of a gain is general.",
        "LoRA is better than it by 4.0 points.",
        "cores on a shared basis is worse than it by 2.0 points.",
        "LoRA of rank 1 is better than it by 2.8 points.",
        "LoRA: no other tenant's adapter is better than a text's own on 2 of 2 texts.",
        "cores on a shared basis: no other tenant's adapter is better than a text's own on 0 of 2 texts.",
        "LoRA of rank 1: no other tenant's adapter is better than a text's own on 2 of 2 texts.",
        "At 80 bytes a tenant, cores on a shared basis has +5.3 % bits per byte against LoRA of rank 1, which takes "
        "1.25 times as many bytes.",
        "The shared basis leaves 60.0 % of an update's norm out in the median of tenants' medians, and 40 % of the "
        "LoRAs' gain is kept: −10.0 % before, −4.0 % after.",
        "8 unaligned adapters of rank 16 are refused by a basis of 32 at --max-error 0.5: 90 % of an update is left "
        "out in the median.",
    ]


def test_what_differs_by_less_than_windows_tell_is_level() -> None:
    own = result()["kinds"]
    near = kind("tenants", {"bible": (0.901, 2.0), "henry": (0.95, 1.8)}, 1600)
    mixed = kind("one LoRA of all texts", {"mixed": (0.9, 1.801)}, 0)
    said = list(findings(result(kinds={"lora": own["lora"], "dsc": near, "mixed": mixed}, equal_bytes={"dsc": "lora"})))
    assert said[0].endswith("in the mean; level with it: tenants.")
    assert "LoRA is level with it." in said and "tenants is level with it." in said
    assert any("tenants is level with LoRA, which takes 1.00 times as many bytes" in line for line in said)


@pytest.mark.parametrize(
    ("lora", "shared", "said"),
    [
        ((0.9, 1.8), (1.1, 2.1), "and nothing of the LoRAs' gain is kept"),
        ((1.1, 2.2), (1.0, 2.0), "and the LoRAs had no gain to keep"),
    ],
)
def test_a_basis_that_keeps_nothing_is_told(lora: tuple[float, float], shared: tuple[float, float], said: str) -> None:
    rows = (dict.fromkeys(TEXTS, own) for own in (lora, shared))
    kinds = {name: kind(name, own, 9) for name, own in zip(("lora", "shared"), rows, strict=True)}
    assert any(said in line for line in findings(result(kinds=kinds, equal_bytes={})))


def test_a_case_that_should_have_been_refused_is_called_a_fault() -> None:
    refusal = {**result()["refusal"], "refused": False, "said": ""}
    assert "are NOT refused, which is a fault" in list(findings(result(refusal=refusal)))[-1]


def test_every_table_is_made_of_the_results() -> None:
    text = report(result())
    assert "dsc-serve 0.1.0, a processor, 2 threads: smol, 2 texts, 1,000 training tokens each" in text
    assert "measured on 512 to 513 held-out tokens of each, in windows of 256." in text
    assert "| the base | 1.500 |" in text
    assert "| LoRA | 1.350 | −10.0 % | −4.3 % | 1,600 | 0 | 2,000 | 62 |" in text
    assert "| one LoRA of all texts | 1.410 | −6.0 % |  | 0 | 1,600 | 2,000 | 62 |" in text
    assert "| cores on a shared basis | 80 | LoRA of rank 1 | 100 | 1.25 | 1.440 | 1.368 | +5.3 % |" in text
    assert "| bible | 50.0 % | 90.0 % | 1.250 | 1.000 | 0.900 | 0.960 |" in text
    rows = text.partition("### Held-out bits per byte: LoRA\n")[2].strip().splitlines()
    assert rows[:6] == [
        "| adapter of | bible | henry |",
        "|---|---|---|",
        "| the base | 1.000 | 2.000 |",
        "| bible | **0.900** | 1.950 |",
        "| henry | 0.950 | **1.800** |",
        "| all texts together | 0.940 | 1.880 |",
    ]
    assert "adapter 'random-0' cannot stand on this basis" in text and "Not finished" not in text
    assert "Held-out bits per byte: one LoRA" not in text, "it is the last row of every table"


def test_an_unfinished_study_says_so() -> None:
    bare = result(kinds={}, equal_bytes={}, base_bits={}, missing=["train lora", "measure lora"])
    text = report({name: own for name, own in bare.items() if name not in ("certificates", "refusal")})
    assert "**Not finished**: train lora, measure lora. The same command goes on." in text
    assert "- Nothing has been measured of any kind yet." in text and "### By kind" not in text


def test_the_block_of_a_document_is_replaced_and_no_other_document_touched(tmp_path: Path) -> None:
    page, other, new = (tmp_path / name for name in ("page.md", "other.md", "new.md"))
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nbehind\n", "utf8")
    check_document(page)
    write_into(page, "one\ntwo\n")
    assert page.read_text("utf8") == f"# Title\n\n{BEGIN}\none\ntwo\n{END}\n\nbehind\n"
    write_into(new, "three")
    check_document(new)
    assert new.read_text("utf8") == f"{BEGIN}\nthree\n{END}\n"
    other.write_text("# Another\n", "utf8")
    with pytest.raises(TrainError, match="results stand between the lines"):
        check_document(other)


def test_the_documents_own_page_has_the_block() -> None:
    check_document(Path(__file__).parents[2] / "docs" / "adaptation.md")
