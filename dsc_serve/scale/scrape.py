"""The metrics of all replicas as one text, each series with its replica's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class Merged(Collector):
    def __init__(self, texts: Mapping[str, bytes]) -> None:
        self.texts = texts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self.texts.items():
            for family in text_string_to_metric_families(text.decode()):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
        yield from families.values()


def merged(texts: Mapping[str, bytes]) -> bytes:
    """The texts of scrapes, by replica, as one; every series gets the label `replica`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Merged(texts))
    return generate_latest(registry)
