"""The Ray Serve application with the engine of timed_engine.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ray.serve import Application

from dsc_serve.scale.app import application
from dsc_serve.scale.settings import read

ENGINE = (sys.executable, str(Path(__file__).with_name("timed_engine.py")))


def build(args: dict[str, Any]) -> Application:
    return application(*read(args), ENGINE)
