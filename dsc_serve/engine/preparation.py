"""The configured model, or a rank's part of it, loaded with the kernels and threads that the configuration says."""

from __future__ import annotations

import torch

from dsc_kernels import native, ops, plain
from dsc_kernels.plan import Planner
from dsc_serve.config import DTYPES, ConfigError, EngineConfig, resolve_model
from dsc_serve.engine.room import check_room
from dsc_serve.machine import default_threads
from dsc_serve.model.calibration import constants
from dsc_serve.model.checkpoint import load_model
from dsc_serve.model.config import CheckpointError
from dsc_serve.model.decoder import Decoder, dsc_layers
from dsc_serve.model.exchange import ALONE, RankExchange
from dsc_serve.text.tokenizer import TokenizerError
from dsc_serve.weight_forms import KeepError

DEVICES = {"cpu": torch.device("cpu"), "cuda": torch.device("cuda", 0)}  # the first that CUDA_VISIBLE_DEVICES shows
INT8_KV = (native.name, plain.name)
CERTIFIED = {  # what is screened in int8, and by which kernels
    "router_precision": ((native.name, "triton"), "native kernels on the CPU, or Triton's"),
    "head_precision": ((native.name,), "native kernels on the CPU"),
}


def prepare_model(config: EngineConfig, exchange: RankExchange = ALONE) -> Decoder:
    """Set the compute threads and load the configured model. Raises ConfigError or CheckpointError in one line.

    exchange: with the ranks that share the model, as many as the configuration says; of it this one's part is loaded.
    """
    shard = exchange.shard
    if config.tensor_parallel != shard.size:
        what = f"tensor_parallel is {config.tensor_parallel}, which servers and LLM take"
        raise ConfigError(f"{what}; allowed here: {shard.size}")
    check_devices(config)
    try:
        ops.use(config.kernels)
        native.use_router(config.router_precision)
        native.use_head(config.head_precision)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    device = device_of(config, shard.rank)
    for name, (backends, needed) in CERTIFIED.items():
        if getattr(config, name) == "int8-certified" and ops.backend(torch.float32, device).name not in backends:
            what = f"{name} is 'int8-certified', which needs {needed}"
            raise ConfigError(f"{what}; allowed with {ops.description(device)}: auto, exact")
    if config.activations == "int8" and ops.backend(torch.float32, device).name != native.name:
        what = "activations is 'int8', which native kernels on the CPU round to"
        raise ConfigError(f"{what}; allowed with {ops.description(device)}: int16, and nothing is rounded")
    if config.kv_dtype == "int8" and ops.backend(torch.float32, device).name not in INT8_KV:
        what = "kv_dtype is 'int8', which native kernels and plain torch serve"
        raise ConfigError(f"{what}; allowed with {ops.description(device)}: auto")
    if config.device == "cuda":
        # Its plans are built for each new shape, which stalls a step: what attends in torch here meets many shapes
        torch.backends.cuda.enable_cudnn_sdp(False)
        ops.use_dependent_launch(config.dependent_launch)
    torch.set_num_threads(max(1, (config.threads or default_threads()) // shard.size))
    check_room(resolve_model(config.model), config, shard)
    try:
        model = load_model(
            resolve_model(config.model),
            DTYPES[config.dtype],
            device,
            config.context,
            config.weights,
            config.keep,
            config.activations,
            exchange,
        )
    except KeepError as error:
        raise ConfigError(str(error)) from None
    if config.router_precision == "int8-certified" and not all(own.layer.screened for own in dsc_layers(model)):
        what = "router_precision is 'int8-certified', which takes at most 64 atoms per token, and on a GPU a γ that is"
        raise ConfigError(f"{what} not all 0; allowed for this model: auto, exact")
    if shard.size > 1:
        return model  # whose ranks compose by themselves, in the order in which tokens come
    measured = constants(model.dtype) if model.device.type == "cpu" else None
    for layer in dsc_layers(model):
        layer.planner = Planner(config.grouping, layer.shape, measured)
    return model


def check_devices(config: EngineConfig) -> None:
    """Raises ConfigError where there are not as many devices as the configuration needs."""
    if config.device != "cuda":
        return
    if not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no CUDA device; allowed here: cpu")
    if config.tensor_parallel > 1 and config.tensor_parallel > (found := torch.cuda.device_count()):
        raise ConfigError(f"tensor_parallel is {config.tensor_parallel}; torch finds {found} CUDA devices: lower it")


def device_of(config: EngineConfig, rank: int) -> torch.device:
    """Where a rank computes: on a GPU of its own, or on the CPU with the others."""
    return DEVICES[config.device] if config.device == "cpu" or rank == 0 else torch.device("cuda", rank)


def start_errors() -> tuple[type[Exception], ...]:
    """What a start may fail with for a reason that its caller can mend."""
    return (ConfigError, CheckpointError, TokenizerError, MemoryError, RuntimeError, *ops.compiler_errors())
