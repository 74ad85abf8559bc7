"""How long prompts and answers are: one length, or lengths drawn from a distribution."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from dsc_serve.config import ConfigError

Draw = Callable[[random.Random], float]

FORMS = "a number, uniform:LOW:HIGH, normal:MEAN:DEVIATION or lognormal:MEDIAN:SIGMA"


@dataclass(frozen=True)
class Lengths:
    """Whole numbers of at least 1."""

    text: str
    draw: Draw

    def __call__(self, rng: random.Random) -> int:
        return max(1, round(self.draw(rng)))


def fixed(value: float) -> Draw:
    return lambda rng: value


def uniform(low: float, high: float) -> Draw:
    return lambda rng: rng.randint(round(low), round(high))


def normal(mean: float, deviation: float) -> Draw:
    return lambda rng: rng.gauss(mean, deviation)


def lognormal(median: float, sigma: float) -> Draw:
    return lambda rng: median * rng.lognormvariate(0.0, sigma)


DISTRIBUTIONS: dict[str, Callable[[float, float], Draw]] = {
    "uniform": uniform,
    "normal": normal,
    "lognormal": lognormal,
}


def parse_lengths(field: str, value: int | str) -> Lengths:
    """The lengths that a setting describes. Raises ConfigError naming the field, the value and what is allowed."""
    name, *rest = str(value).split(":")
    try:
        if not rest:
            name, numbers = "", [float(int(name))]
        else:
            numbers = [float(part) for part in rest]
        if not 1 <= numbers[0] < float("inf") or not all(0 <= number < float("inf") for number in numbers):
            raise ValueError
        if name == "uniform" and numbers[0] > numbers[1]:
            raise ValueError
        return Lengths(str(value), fixed(numbers[0]) if not name else DISTRIBUTIONS[name](*numbers))
    except (ValueError, KeyError, TypeError, IndexError):
        raise ConfigError(f"{field} is {value!r}; it must be {FORMS}, and at least 1") from None
