"""`dsc-serve adapter inspect` of tenants of a bank, and of low-rank updates as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.random_adapters import random_adapters
from support.tenants import random_tenant

from dsc_serve.cli import main
from dsc_serve.config import EMBEDDED_MODEL, resolve_model
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.tenant import write_tenant
from dsc_serve.train.sentences import paragraphs


def inspect(*words: object) -> Result:
    return CliRunner().invoke(main, ["adapter", "inspect", *map(str, words)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = open_source(resolve_model(EMBEDDED_MODEL)).config
    for i, name in enumerate(("law", "ode")):
        tenant = random_tenant(config, i, gamma=0.5)
        write_tenant(tmp_path / name, tenant.bias, tenant.gamma, "")
    (tmp_path / "text.txt").write_text(paragraphs(20))
    return tmp_path


def test_a_certificate_needs_no_base(folder: Path) -> None:
    told: dict[str, Any] = json.loads(inspect(folder / "law", "--json").output)
    config = open_source(resolve_model(EMBEDDED_MODEL)).config
    tenant = random_tenant(config, 0, gamma=0.5)
    assert told["certificate"] == pytest.approx(tenant.gamma.abs().amax(1).tolist())
    assert (told["kind"], told["layers"], told["bytes"]) == ("dsc", len(tenant.bias), tenant.nbytes)
    lines = inspect(folder / "law", "--base", EMBEDDED_MODEL).output
    assert "a tenant of the bank of no name" in lines and "fits      dsc-tiny" in lines
    write_tenant(folder / "law", tenant.bias, tenant.gamma, "another")
    refused = inspect(folder / "law", "--base", EMBEDDED_MODEL)
    assert refused.exit_code == 1 and "it is of the bank 'another'; the model has ''" in refused.output


def test_on_a_text_it_is_told_what_tenants_pick_and_share(folder: Path) -> None:
    words = (folder / "law", "--base", EMBEDDED_MODEL, "--text", folder / "text.txt", "--beside", "ode")
    law, ode = json.loads(inspect(*words, "--json").output)
    assert (law["name"], ode["name"]) == ("law", "ode") and law["overlap"]["ode"] == ode["overlap"]["law"]
    for own in (law, ode):
        assert 0 < next(iter(own["overlap"].values())) < 1 and own["tokens"] > 100 and own["signal"] > 0
        assert all(0 < bound <= most for bound, most in zip(own["bound"], own["certificate"], strict=True))
        assert all(0 < count <= own["atoms"] for count in own["distinct"])
    lines = inspect(*words).output
    assert "different atoms a layer on" in lines and "of the atoms of either with ode" in lines


def test_low_rank_updates_as_json(tmp_path: Path) -> None:
    random_adapters(tmp_path, "law")
    told = json.loads(inspect(tmp_path / "law", "--json", "--atoms", "2").output)
    assert told["kind"] == "lora" and told["bytes"] > 0
    one = next(iter(told["modules"].values()))
    assert one["rank"] == 4 and 0 < one["left_out"] < one["norm"]


def test_options_that_would_not_act_are_refused(folder: Path, tmp_path: Path) -> None:
    random_adapters(tmp_path, "lora")
    for words, message in [
        ((folder / "law", "--atoms", "2"), "--atoms and --out are for low-rank updates"),
        ((folder / "law", "--beside", "ode"), "--beside is given without --text"),
        ((folder / "law", "--text", folder / "text.txt"), "--text is given without --base"),
        ((tmp_path / "lora", "--beside", "ode"), "--text and --beside are for tenants"),
    ]:
        result = inspect(*words)
        assert result.exit_code == 2 and message in result.output
