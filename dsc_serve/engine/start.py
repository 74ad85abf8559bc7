"""The configured model with an engine that runs it: in this process, or in several that share the model."""

from __future__ import annotations

from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.model.decoder import Decoder


def start_engine(config: EngineConfig, strict: bool = False) -> tuple[Engine, Decoder]:
    """Raises ConfigError, CheckpointError and TokenizerError in one line; what else starts have failed with."""
    if config.tensor_parallel == 1:
        model = prepare_model(config)
        return Engine.for_model(model, config, strict), model
    from dsc_serve.engine.ranks.leader import Ranks  # which loads torch's collectives

    ranks = Ranks(config)
    try:
        model = prepare_model(config, ranks.group)
        return Engine.for_model(model, config, strict, ranks), model
    except BaseException:
        ranks.close()
        raise
