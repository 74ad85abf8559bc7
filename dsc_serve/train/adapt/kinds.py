"""The kinds of adapters that are trained: a registry."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from dsc_serve.train.adapt.branch_trainer import BranchTrainer
from dsc_serve.train.adapt.core_trainer import CoreTrainer
from dsc_serve.train.adapt.settings import AdapterRunSettings, AdaptSettings, BranchSettings, CoreSettings
from dsc_serve.train.adapt.trainer import AdapterTrainer


class TrainedKind(NamedTuple):
    settings: type[AdapterRunSettings]
    trainer: Callable[..., AdapterTrainer]
    of_bank: Callable[..., AdapterTrainer] | None = None  # where the model's bank stays too


KINDS = {
    "lora": TrainedKind(AdaptSettings, AdapterTrainer),
    "lora-xs": TrainedKind(CoreSettings, CoreTrainer),
    "dsc": TrainedKind(BranchSettings, BranchTrainer, partial(BranchTrainer, frozen=True)),
}
