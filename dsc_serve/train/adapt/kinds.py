"""The kinds of adapters that are trained: a registry."""

from __future__ import annotations

from typing import NamedTuple

from dsc_serve.train.adapt.core_trainer import CoreTrainer
from dsc_serve.train.adapt.settings import AdaptSettings, CoreSettings, LowRankSettings
from dsc_serve.train.adapt.trainer import AdapterTrainer


class TrainedKind(NamedTuple):
    settings: type[LowRankSettings]
    trainer: type[AdapterTrainer]


KINDS = {
    "lora": TrainedKind(AdaptSettings, AdapterTrainer),
    "lora-xs": TrainedKind(CoreSettings, CoreTrainer),
}
