"""How counts become families of Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from dsc_serve.engine.histogram import Histogram

PREFIX = "dsc_serve_"
Families = Iterable[Metric]
Labels = tuple[str, ...]


def counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value)


def counters(name: str, text: str, labels: Labels, values: Mapping[Labels, float]) -> Metric:
    """One series for each key of `values`, which holds a value for each label."""
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value)


def gauges(name: str, text: str, labels: Labels, values: Mapping[Labels, float]) -> Metric:
    """As `counters`."""
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def histogram(name: str, text: str, value: Histogram) -> Metric:
    return histograms(name, text, (), {(): value})


def histograms(name: str, text: str, labels: Labels, values: Mapping[Labels, Histogram]) -> Metric:
    """As `counters`."""
    family = HistogramMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        edges = [*(f"{edge:g}" for edge in value.edges), "+Inf"]
        family.add_metric(key, list(zip(edges, value.cumulative, strict=True)), value.sum)
    return family
