"""The `args` of a Serve config file: every name is a setting, and one that acts here."""

from __future__ import annotations

from typing import Any

import pytest

from dsc_serve.config import ConfigError
from dsc_serve.scale.settings import NOT_HERE, read
from dsc_serve.settings import SETTINGS


def test_settings_of_both_kinds_are_read() -> None:
    server, scale = read({"model": "dsc-tiny", "max_running": 8, "routing": "round-robin", "load_factor": 2.0})
    assert (server.engine.max_running, scale.routing, scale.load_factor) == (8, "round-robin", 2.0)
    assert set(SETTINGS) >= NOT_HERE


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"port": 8001}, "port is not for replicas; see http_options"),
        ({"max_runing": 8}, "max_runing is not a setting; did you mean max_running"),
        ({"routing": "best"}, "routing is 'best'; it must be one of affinity, round-robin"),
        ({"load_factor": 0.5}, "load_factor is 0.5; it must be a number of at least 1"),
        ({"max_running": "many"}, "args: max_running is 'many'; it must be an integer"),
    ],
)
def test_others_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(args)
    assert message in str(error.value)
