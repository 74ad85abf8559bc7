"""Tests of `make test-deploy`: the files of deploy/ with the real programs they are made for."""

from __future__ import annotations

from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="session")
def deploy() -> Path:
    """The folder of what is deployed."""
    return DEPLOY
