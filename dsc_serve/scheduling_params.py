"""How a request is scheduled: for whom, how urgently, within what time. Free of torch."""

from __future__ import annotations

import math

import msgspec

from dsc_serve.parameter_errors import reject

MAX_PRIORITY = 2**31 - 1
MAX_TIMEOUT_S = 7 * 24 * 3600.0
MAX_SALT = 256


class SchedulingParams(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler may know of a request besides its tokens. Times are from its arrival at the engine.

    Raises ParameterError naming a field that cannot be used.
    """

    tenant: str = ""  # whom the work is charged to; "": nobody in particular
    weight: float = 1.0  # the tenant's share, relative to others'
    priority: int = 0  # lower is served earlier
    queue_timeout_s: float | None = None  # until it must have begun to compute; None: no limit
    timeout_s: float | None = None  # until it must have ended; None: no limit
    cache_salt: str = ""  # prompts share cached prefixes only where their salts are equal

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            reject("weight", self.weight, "a finite number above 0")
        if abs(self.priority) > MAX_PRIORITY:
            reject("priority", self.priority, f"between -{MAX_PRIORITY} and {MAX_PRIORITY}")
        for field in ("queue_timeout_s", "timeout_s"):
            value = getattr(self, field)
            if value is not None and not 0 < value <= MAX_TIMEOUT_S:
                reject(field, value, f"above 0 and at most {MAX_TIMEOUT_S:g} seconds")
        if len(self.cache_salt) > MAX_SALT:
            reject("cache_salt", f"{len(self.cache_salt)} characters", f"at most {MAX_SALT}")

    def overdue(self, field: str) -> str:
        """What to tell of a request that is out of the time of this field."""
        waited = "did not begin" if field == "queue_timeout_s" else "did not end"
        return f"the request {waited} within its {field} of {getattr(self, field):g} s"
