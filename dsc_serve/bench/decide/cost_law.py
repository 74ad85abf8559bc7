"""The law of step times: a sum of terms, each at a cost that is fitted to measured steps and never below zero.

One law for each form of weights. What all kinds share (the step itself, its requests, attention, the head) has one
cost, fitted to all kinds together; the FFN's layers, bytes and FLOPs have costs for each kind.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from dsc_serve.bench.decide.measured_machine import MeasuredMachine, MeasuredStep
from dsc_serve.bench.decide.sizes import DecideError, ModelFrame
from dsc_serve.bench.decide.step_terms import SYSTEMS, ServedForm, StepShape, step_terms

MOST_ROUNDS = 1000
FITS = 6  # each by the errors of the one before
FAR = 1.5  # times the median error, from which on a step counts for less: something else used the machine then
LEAST_SHARE = 1e-9  # of the largest gradient, below which nothing more is gained


class CostLaw(msgspec.Struct, frozen=True):
    """Milliseconds of each term of a step, for one form of weights."""

    costs: dict[str, float]
    forms: dict[str, ServedForm]  # by system

    def ms(self, system: str, frame: ModelFrame, step: StepShape) -> float:
        """What a step of this system is expected to take."""
        terms = step_terms(system, frame.config(SYSTEMS[system].ffn), self.forms[system], step)
        return sum(self.costs.get(name, 0.0) * value for name, value in terms.items())


class FitError(msgspec.Struct, frozen=True):
    """How far predicted times are from measured ones, relative to these: median and largest, of so many."""

    median: float
    largest: float
    count: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> FitError:
        """pairs: predicted and measured."""
        errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
        return cls(statistics.median(errors), max(errors), len(errors))


def nonnegative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x ≥ 0 that makes |a x − b| the least, for a [n, m] and b [n]. Source: Lawson and Hanson, chapter 23."""
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    a = a / scale
    x = np.zeros(a.shape[1])
    free = np.zeros(a.shape[1], dtype=bool)
    least = LEAST_SHARE * max(float(np.abs(a.T @ b).max(initial=0.0)), 1e-300)
    for _ in range(MOST_ROUNDS):
        gradient = np.where(free, -np.inf, a.T @ (b - a @ x))
        if free.all() or gradient.max() <= least:
            break
        free[int(gradient.argmax())] = True
        while free.any():
            best = np.zeros_like(x)
            best[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            below = free & (best <= 0)
            if not below.any():
                x = best
                break
            steps = x[below] / (x[below] - best[below] + 1e-300)
            x = x + steps.min() * (best - x)
            free &= x > 1e-14
            x[~free] = 0.0
    costs: NDArray[np.float64] = x / scale
    return costs


def terms_of(measured: MeasuredMachine, row: MeasuredStep) -> dict[str, float]:
    config = measured.sizes[row.size].config(SYSTEMS[row.system].ffn)
    return step_terms(row.system, config, row.form, row.step)


def fit(measured: MeasuredMachine, weights: str, without: str = "") -> CostLaw:
    """By the least sum of relative errors, squared where they are small (Huber's). without: a size that is left out.

    Raises DecideError.
    """
    rows = [row for row in measured.steps if row.form.weights == weights and row.size != without]
    if not rows:
        raise DecideError(f"no step was measured with weights {weights!r}; there are {', '.join(measured.weights())}")
    terms = [terms_of(measured, row) for row in rows]
    names = list(dict.fromkeys(name for own in terms for name in own))
    ms = np.array([row.ms for row in rows])
    a = np.array([[own.get(name, 0.0) for name in names] for own in terms]) / ms[:, None]
    weights_of = np.ones(len(rows))
    for _ in range(FITS):
        costs = nonnegative(a * weights_of[:, None], weights_of)
        errors = np.abs(a @ costs - 1)
        far = max(FAR * float(np.median(errors)), 1e-6)
        weights_of = np.sqrt(np.minimum(1.0, far / np.maximum(errors, 1e-12)))
    forms = {name: measured.form_of(name, weights) for name in measured.systems(weights)}
    return CostLaw(dict(zip(names, costs.tolist(), strict=True)), forms)


def predicted(law: CostLaw, measured: MeasuredMachine, row: MeasuredStep) -> float:
    return sum(law.costs.get(name, 0.0) * value for name, value in terms_of(measured, row).items())


def fit_errors(measured: MeasuredMachine, weights: str, law: CostLaw) -> Mapping[str, FitError]:
    """Of the law on the steps that it was fitted to, by system."""
    found = {}
    for system in measured.systems(weights):
        rows = [row for row in measured.steps if (row.system, row.form.weights) == (system, weights)]
        found[system] = FitError.of([(predicted(law, measured, row), row.ms) for row in rows])
    return found


def held_out_errors(measured: MeasuredMachine, weights: str) -> Mapping[str, FitError]:
    """By system: of laws that were fitted without a size, on the steps of that size; nothing where there is one."""
    sizes = list(dict.fromkeys(row.size for row in measured.steps if row.form.weights == weights))
    pairs: dict[str, list[tuple[float, float]]] = {}
    for size in sizes if len(sizes) > 1 else ():
        law = fit(measured, weights, size)
        for row in measured.steps:
            if (row.size, row.form.weights) == (size, weights):
                pairs.setdefault(row.system, []).append((predicted(law, measured, row), row.ms))
    return {system: FitError.of(own) for system, own in pairs.items()}
