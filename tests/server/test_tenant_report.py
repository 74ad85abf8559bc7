"""GET /admin/tenants: what tenants of the bank have picked, for administrators."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from support.access import BOB, ROOT, Write, bearer, entry
from support.fake_engine import FakeEngine
from support.serving import app_around, ask

from dsc_serve.engine.tenant_report import TenantFigures, TenantsReport
from dsc_serve.server.keys import KeyRing


@pytest.fixture
def guarded(engine: FakeEngine, write: Write) -> FastAPI:
    return app_around(engine, None, KeyRing(write(entry("bob", BOB) + entry("root", ROOT, admin=True)), ""))


def test_the_report_is_told_as_it_is(guarded: FastAPI, engine: FakeEngine) -> None:
    use = TenantFigures(
        name="law",
        digest="d" * 64,
        certificate=[0.5, 0.25],
        bound=[0.4, 0.2],
        tokens=7,
        signal=1.5,
        distinct=[3, 4],
        overlap={"tax": 0.5},
    )
    engine.tenants_report = TenantsReport(
        layers=[0, 1], atoms=8, atoms_per_token=2, bank="b", shared=[2, 1], tenants=[use]
    )
    assert ask(guarded, "GET", "/admin/tenants", headers=bearer(BOB)).status_code == 403
    answer = ask(guarded, "GET", "/admin/tenants", headers=bearer(ROOT))
    assert answer.status_code == 200
    told = answer.json()
    assert (told["layers"], told["atoms"], told["bank"], told["shared"]) == ([0, 1], 8, "b", [2, 1])
    assert told["tenants"] == [
        {
            "name": "law",
            "digest": "d" * 64,
            "certificate": [0.5, 0.25],
            "bound": [0.4, 0.2],
            "tokens": 7,
            "signal": 1.5,
            "distinct": [3, 4],
            "overlap": {"tax": 0.5},
        }
    ]


def test_an_engine_that_is_down_is_said_to_be(guarded: FastAPI, engine: FakeEngine) -> None:
    engine.alive = False
    assert ask(guarded, "GET", "/admin/tenants", headers=bearer(ROOT)).status_code == 503
