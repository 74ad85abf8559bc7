"""The configured model, loaded with the kernels and threads that the configuration says."""

from __future__ import annotations

import torch

from dsc_kernels import native, ops, plain
from dsc_kernels.plan import Planner
from dsc_serve.config import DTYPES, ConfigError, EngineConfig, resolve_model
from dsc_serve.engine.room import check_room
from dsc_serve.machine import default_threads
from dsc_serve.model.calibration import constants
from dsc_serve.model.checkpoint import load_model
from dsc_serve.model.decoder import Decoder, dsc_layers
from dsc_serve.weight_forms import KeepError

DEVICES = {"cpu": torch.device("cpu"), "cuda": torch.device("cuda", 0)}  # the first that CUDA_VISIBLE_DEVICES shows
INT8_KV = (native.name, plain.name)


def prepare_model(config: EngineConfig) -> Decoder:
    """Set the compute threads and load the configured model. Raises ConfigError or CheckpointError in one line."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no CUDA device; allowed here: cpu")
    try:
        ops.use(config.kernels)
        native.use_router(config.router_precision)
        native.use_head(config.head_precision)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    device = DEVICES[config.device]
    for name in ("router_precision", "head_precision"):
        if getattr(config, name) == "int8-certified" and ops.backend(torch.float32, device).name != native.name:
            what = f"{name} is 'int8-certified', which needs native kernels on the CPU"
            raise ConfigError(f"{what}; allowed with {ops.description(device)}: auto, exact")
    if config.kv_dtype == "int8" and ops.backend(torch.float32, device).name not in INT8_KV:
        what = "kv_dtype is 'int8', which native kernels and plain torch serve"
        raise ConfigError(f"{what}; allowed with {ops.description(device)}: auto")
    if config.device == "cuda":
        # Its plans are built for each new shape, which stalls a step: what attends in torch here meets many shapes
        torch.backends.cuda.enable_cudnn_sdp(False)
        ops.use_dependent_launch(config.dependent_launch)
    torch.set_num_threads(config.threads or default_threads())
    check_room(resolve_model(config.model), config)
    try:
        model = load_model(
            resolve_model(config.model),
            DTYPES[config.dtype],
            device,
            config.context,
            config.weights,
            config.keep,
            config.activations,
        )
    except KeepError as error:
        raise ConfigError(str(error)) from None
    measured = constants(model.dtype) if model.device.type == "cpu" else None
    for layer in dsc_layers(model):
        layer.planner = Planner(config.grouping, layer.shape, measured)
    return model
