"""What the tests of client libraries share: a model for structured answers, tools, and a chat that is too long."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

MODEL = "dsc-tiny"
QUESTION = "What is the weather in Paris?"
TOO_LONG = "The king said to the people of the old town: " * 400  # the embedded model holds 1,024 tokens


class Report(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=12)
    sky: Literal["clear", "cloudy", "rain"]
    degrees: int = Field(ge=-40, le=50)


def client_library(name: str) -> ModuleType:
    """The library, or a skip that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is missing; install the extra: pip install '.[clients]'", allow_module_level=True)
