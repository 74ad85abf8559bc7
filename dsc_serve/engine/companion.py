"""The smaller model that drafts beside the served one: loaded, compared with it, and given KV blocks of its own."""

from __future__ import annotations

import torch

from dsc_serve.config import DTYPES, ConfigError, EngineConfig, resolve_model
from dsc_serve.engine.drafts.model import DraftModel
from dsc_serve.engine.runner import Runner
from dsc_serve.model.checkpoint import load_model
from dsc_serve.model.decoder import Decoder
from dsc_serve.sampling_params import EngineCapacity
from dsc_serve.text.tokenizer import Tokenizer

FIELD = "draft_model"


def load_companion(config: EngineConfig, model: Decoder, tokenizer: Tokenizer | None) -> Decoder:
    """The model of `draft_model`, on the served one's device, in its dtype, with weights held as `weights` says.

    What `keep` names is the served model's alone.

    Raises ConfigError where its tokens are not the served model's, ConfigError and CheckpointError where it cannot be
    loaded.
    """
    path = resolve_model(config.draft_model)
    dtype = "float32" if model.dtype == torch.float32 else DTYPES[config.dtype]
    loaded = load_model(path, dtype, model.device, weights=config.weights, activations=config.activations)
    ours, theirs = model.config.vocab_size, loaded.config.vocab_size
    if ours != theirs:
        raise ConfigError(
            f"{FIELD} is {config.draft_model!r}, which has {theirs} tokens; the served model has {ours}, and a draft "
            "model must have the same ones"
        )
    different = difference(tokenizer, Tokenizer.load(path), ours)
    if different:
        raise ConfigError(f"{FIELD} is {config.draft_model!r}: {different}; a draft model must have the same tokens")
    return loaded


def difference(ours: Tokenizer | None, theirs: Tokenizer | None, vocabulary: int) -> str:
    """What tells two tokenizers apart, or ""."""
    if ours is None or theirs is None:
        return "" if ours is theirs else f"{'it' if theirs is None else 'the served model'} has no tokenizer"
    for token in range(vocabulary):
        one, other = ours.token_bytes(token), theirs.token_bytes(token)
        if one != other:
            return f"its token {token} is {other!r}, and the served model's is {one!r}"
        if ours.is_special(token) != theirs.is_special(token):
            return (
                f"its token {token} is {'' if theirs.is_special(token) else 'not '}special, unlike the served model's"
            )
    return ""


def companion_drafts(config: EngineConfig, model: Decoder, capacity: EngineCapacity) -> DraftModel:
    """The loaded model with KV blocks for as many tokens as the served one has."""
    windows = model.groups.windows
    own = EngineCapacity(
        vocab_size=capacity.vocab_size,
        max_model_len=model.config.max_position_embeddings,
        num_blocks=len(windows) * (capacity.num_blocks // len(capacity.kv_windows)),
        block_size=capacity.block_size,
        kv_windows=windows,
        step_tokens=config.step_tokens,
    )
    int8_kv = config.kv_dtype == "int8"
    compiles = model.device.type != "cpu"
    runner = Runner(model, own, config.step_tokens, config.max_running, int8_kv=int8_kv, spare=compiles)
    if compiles:
        runner.warm_up()
    context = min(own.max_model_len, own.num_blocks // len(windows) * own.block_size)
    return DraftModel(runner, own.num_blocks, own.block_size, config.step_tokens, context, len(windows))
