"""Scheduling policies: pure functions from a read-only view to a plan, one file each, registered by name."""

from __future__ import annotations

from dsc_serve.engine.policies.base import Budget, Plan, Policy, View
from dsc_serve.engine.policies.fcfs import fcfs

POLICIES: dict[str, Policy] = {"fcfs": fcfs}

__all__ = ["POLICIES", "Budget", "Plan", "Policy", "View"]
