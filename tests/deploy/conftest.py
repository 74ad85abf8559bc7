"""Tests of `make test-deploy`: the files of deploy/ with the real programs they are made for."""

from __future__ import annotations

from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("deploy")


@pytest.fixture(scope="session")
def deploy() -> Path:
    """The folder of what is deployed."""
    return DEPLOY
