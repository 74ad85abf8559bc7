"""How many steps of a server of ours had a part of a prompt, from its metrics: their tokens come later than others."""

from __future__ import annotations

import http.client
import re
from urllib.parse import urlsplit

PROMPT_STEPS = "prompt_steps"  # the share's name among a load's figures
ALL, WITH_PROMPT = "dsc_serve_engine_steps_total", "dsc_serve_engine_prompt_steps_total"
LIMIT_S = 5.0

Steps = tuple[float, float]  # all, and those with a part of a prompt


def step_counts(url: str) -> Steps | None:
    """Since the server began; None where it does not tell them."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=LIMIT_S)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode("utf-8", errors="replace")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    found = [re.search(rf"^{name} (\S+)$", text, re.MULTILINE) for name in (ALL, WITH_PROMPT)]
    counts = [float(one[1]) for one in found if one is not None]
    return (counts[0], counts[1]) if len(counts) == 2 else None


def share_between(before: Steps | None, after: Steps | None) -> float | None:
    """The share of the steps between two looks that had a part of a prompt; None where that is not known."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    return (after[1] - before[1]) / (after[0] - before[0])
