"""The architecture of a model: a checkpoint's `config.json`, with Hugging Face's field names where one exists."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dsc_serve.documents import DocumentError, parse_json, read_document
from dsc_serve.files import CheckpointError as CheckpointError
from dsc_serve.files import refuse_pointer
from dsc_serve.model.ffn_config import DenseConfig as DenseConfig
from dsc_serve.model.ffn_config import DscConfig as DscConfig
from dsc_serve.model.ffn_config import FfnConfig as FfnConfig
from dsc_serve.model.ffn_config import MoeConfig as MoeConfig
from dsc_serve.model.ffn_config import MoloraConfig as MoloraConfig
from dsc_serve.model.ffn_config import SharedExpertConfig as SharedExpertConfig
from dsc_serve.model.ffn_config import is_plain
from dsc_serve.model.field_value import Place, plain, reworded, told
from dsc_serve.model.quantised_config import QuantisedTensors
from dsc_serve.model.rope import DynamicRope, LinearRope, LongRope, RopeScaling, YarnRope
from dsc_serve.model.schema import Layers, Size, Strict

FORMAT = 3  # the newest that is read; one more whenever an older version would read it wrongly; without a number: 1
SINCE_FORMAT_2 = ("norms", "qk_norm", "rotation", "rotary_dim", "layer_kinds", "layer_pattern")
SINCE_FORMAT_3 = ("window", "attention_cap", "logits_cap", "embedding_scale", "latent_size")
ROUTING = ("scoring", "choice_bias", "groups", "groups_used", "group_picks", "weight_scale")
KINDS_SINCE_FORMAT_3 = ("window", "rope_theta", "rope_scaling")

IGNORED = {
    "architectures",
    "pad_token_id",
    "transformers_version",
    "use_cache",
    "torch_dtype",
    "dtype",
    "initializer_range",
}


MOST_SHOWN, MOST_CHARACTERS = 8, 80  # of the faults of a configuration, and of a value that is wrong


# Where the norms of a layer stand: each before its branch, each after its branch and before the sum, or each before its
# branch with both branches beside each other, which may share one norm, or one before and one after each branch.
NormPlaces = Literal["before", "after", "parallel", "shared", "around"]
# Which norm queries and keys get before they are turned: none, one over each head, one over all heads together, or one
# of what is latent in the key.
QkNorm = Literal["none", "head", "all", "latent"]


Window = Annotated[int, Field(ge=0, le=2**30)]
Cap = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LayerKind(Strict):
    """In what layers of one kind differ from the model's own fields of these names; None: in nothing."""

    ffn: FfnConfig | None = None
    norms: NormPlaces | None = None
    qk_norm: QkNorm | None = None
    rotation: bool | None = None
    window: Window | None = None
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    rope_scaling: LinearRope | None = None


class ModelConfig(Strict):
    """One decoder: layers of attention and an FFN of the configured kind."""

    model_type: Literal["dsc"] = "dsc"
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Annotated[int, Field(ge=1, le=2**16)]
    max_position_embeddings: Size
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    position_embedding_type: Literal["learned", "rope"] = "rope"
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # of the projections to q, k and v
    attention_output_bias: bool = False  # of the one after attention
    norms: NormPlaces = "before"
    qk_norm: QkNorm = "none"
    rotation: bool = True  # whether rotary positions turn queries and keys
    rotary_dim: Size | None = None  # how many numbers of each head they turn, None: all
    window: Window = 0  # positions that a token sees, its own the last of them, 0: all
    attention_cap: Cap = 0.0  # scores become cap · tanh(x / cap), 0: they stay
    logits_cap: Cap = 0.0  # the same of logits
    embedding_scale: Annotated[float, Field(gt=0)] = 1.0  # what tokens' embeddings are multiplied by
    # The last so many numbers of a layer's one key are its value too, and there are no others; None: values are
    # projected as keys are
    latent_size: Size | None = None
    hidden_act: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    mlp_gated: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    ffn: FfnConfig
    # What differs from layer to layer; without kinds all layers are alike
    layer_kinds: list[LayerKind] = Field(default_factory=list)
    # The kind of each layer, by its place in that list, repeated over the layers
    layer_pattern: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    quantised: list[QuantisedTensors] = Field(default_factory=list)  # which tensors are stored in fewer bits

    @model_validator(mode="after")
    def _quantised_once(self) -> ModelConfig:
        names = Counter(name for form in self.quantised for name in form.tensors)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"quantised names tensor {twice[0]} twice")
        return self

    @model_validator(mode="after")
    def _kinds(self) -> ModelConfig:
        kinds, pattern, layers = self.layer_kinds, self.layer_pattern, self.num_hidden_layers
        if set(pattern) != set(range(len(kinds))):
            raise ValueError(
                f"layer_pattern names {sorted(set(pattern))} of the layer_kinds, of which are {len(kinds)}"
            )
        if len(pattern) > layers:
            raise ValueError(f"layer_pattern has {len(pattern)} entries, more than num_hidden_layers, {layers}")
        ffns = [layer.ffn for layer in self.kinds]
        banks = [own for own in ffns if isinstance(own, DscConfig)]
        other = next((own for own in ffns if banks and own != banks[0] and not isinstance(own, DenseConfig)), None)
        if other is not None:
            raise ValueError(
                f"ffn differs between layers, of which some are of kind 'dsc' and one of kind {other.kind!r}; those of "
                "kind 'dsc' must have the same, and others be 'dense'"
            )
        return self

    @model_validator(mode="after")
    def _latent(self) -> ModelConfig:
        norms = {layer.qk_norm for layer in self.kinds}
        if self.latent_size is None:
            if "latent" in norms:
                raise ValueError("qk_norm is 'latent', but latent_size is not given")
            return self
        if self.num_key_value_heads != 1 or self.latent_size >= self.head_dim:
            what = f"num_key_value_heads is {self.num_key_value_heads}, head_dim {self.head_dim}"
            raise ValueError(f"latent_size is {self.latent_size}, {what}; it needs one head that is larger")
        if norms != {"latent"} or self.attention_bias or self.position_embedding_type != "rope":
            raise ValueError("latent_size is given; it needs qk_norm 'latent', rotary positions and no attention_bias")
        if self.turned > self.head_dim - self.latent_size:
            raise ValueError(f"rotary_dim is {self.turned}; only {self.head_dim - self.latent_size} are not latent")
        return self

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which num_key_value_heads, "
                f"{self.num_key_value_heads}, does not divide"
            )
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for token in ids:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} is {token}; allowed: 0 to {self.vocab_size - 1}")
        turned = self.turned
        if self.position_embedding_type == "rope" and (turned % 2 or turned > self.head_dim):
            if self.rotary_dim is None:
                raise ValueError(f"head_dim is {self.head_dim}; rope needs an even one")
            raise ValueError(f"rotary_dim is {turned}; it must be even and at most head_dim, {self.head_dim}")
        scaling = self.rope_scaling
        if self.position_embedding_type != "rope":
            unturned = not all(layer.rotation for layer in self.kinds)
            given = {"rope_scaling": scaling, "rotary_dim": self.rotary_dim, "rotation": unturned or None}
            named = [name for name, value in given.items() if value is not None]
            if named:
                raise ValueError(f"{named[0]} is given, but position_embedding_type is 'learned'")
        if any(isinstance(layer.rope_scaling, YarnRope) and layer.rope_theta == 1 for layer in self.kinds):
            raise ValueError("rope_theta is 1; with rope_scaling yarn it must be another number")
        scalings = [layer.rope_scaling for layer in self.kinds]
        for name, divisors in (divided for own in scalings if own is not None for divided in own.divided):
            if 2 * len(divisors) != turned:
                what = "head_dim" if self.rotary_dim is None else "rotary_dim"
                raise ValueError(f"rope_scaling.{name} has {len(divisors)} numbers; expected half of {what}, {turned}")
        return self

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def with_context(self, positions: int) -> ModelConfig:
        """The same for so many positions; 0: as it is. Raises ValueError where the model cannot have as many."""
        most = self.max_position_embeddings
        if positions > most and self.position_embedding_type == "learned":
            raise ValueError(f"context is {positions}; the model has learned {most} positions")
        scaling = self.rope_scaling
        if isinstance(scaling, LongRope) and positions > scaling.max_position_embeddings:
            raise ValueError(
                f"context is {positions}; with longrope at most {scaling.max_position_embeddings} are served"
            )
        if positions > most and isinstance(scaling, DynamicRope):
            raise ValueError(f"context is {positions}; with dynamic scaling of positions at most {most} are served")
        return self.model_copy(update={"max_position_embeddings": positions}) if positions else self

    @property
    def longest_context(self) -> int:
        """The positions that the model is for, which may be more than are served unless asked for."""
        scaling = self.rope_scaling
        return scaling.max_position_embeddings if isinstance(scaling, LongRope) else self.max_position_embeddings

    @property
    def kinds(self) -> tuple[ModelConfig, ...]:
        """For each kind of layer a configuration whose layers are all of it."""
        if not self.layer_kinds:
            return (self,)
        alike: dict[str, object] = {"layer_kinds": [], "layer_pattern": []}
        own = ({name: getattr(kind, name) for name in LayerKind.model_fields} for kind in self.layer_kinds)
        changes = ({name: value for name, value in kind.items() if value is not None} for kind in own)
        return tuple(self.model_copy(update={**alike, **change}) for change in changes)

    @property
    def layers(self) -> tuple[ModelConfig, ...]:
        """For each layer, in order, the configuration of `kinds` that it is of."""
        kinds, pattern = self.kinds, self.layer_pattern or [0]
        return tuple(kinds[pattern[i % len(pattern)]] for i in range(self.num_hidden_layers))

    @property
    def turned(self) -> int:
        """Numbers of each head that rotary positions turn."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Numbers of a head's value."""
        return self.head_dim if self.latent_size is None else self.latent_size

    @property
    def projected(self) -> int:
        """Rows, or columns, of hidden_size that the projections around attention have in all."""
        return self.query_size + self.cached_size + self.num_attention_heads * self.value_size

    @property
    def cached_size(self) -> int:
        """Numbers that a layer keeps of a token."""
        return self.cached_rows * self.head_dim

    @property
    def cached_rows(self) -> int:
        """Keys and values of heads that a layer keeps of a token, each of head_dim numbers."""
        return self.num_key_value_heads * (2 if self.latent_size is None else 1)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError in one line."""
    refuse_pointer(path)
    try:
        content = parse_json(read_document(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except DocumentError as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a JSON object")
    return content


# pydantic puts the kind of an FFN or of a scaling into the path, and the type of what may have two
TAGS = {"dsc", "moe", "molora", "dense", "linear", "dynamic", "llama3", "yarn", "divisors", "longrope"}
TAGS |= {"int", "tuple[int, ...]"}


def one_line(error: ValidationError, names: Mapping[Place, str] | None = None) -> str:
    """A pydantic error as one line: field, what is wrong, the value. names: of the fields that have others."""
    parts, names = [], names or {}
    for item in error.errors()[:MOST_SHOWN]:
        place = tuple(p for p in item["loc"] if p not in TAGS)
        value = item.get("input")
        shown = "" if isinstance(value, dict) or item["type"] == "missing" else f" (got {shortened(value)})"
        message = reworded(item["msg"].removeprefix("Value error, "), place, names)
        about_several = item["type"] == "value_error" and names and place not in names
        parts.append(message if about_several else f"{told(place, names) or 'config'}: {message}{shown}")
    more = error.error_count() - MOST_SHOWN
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def load_config(folder: Path) -> ModelConfig:
    """Read and check `config.json`. Raises CheckpointError naming every field that is wrong."""
    path = folder / "config.json"
    content = {k: v for k, v in read_json(path).items() if k not in IGNORED}
    form = content.get("model_type", "dsc")
    if form != "dsc":
        raise CheckpointError(f"{path}: model_type is {form!r}; expected 'dsc', this server's own form")
    number = content.pop("format", FORMAT)
    if type(number) is not int or not 1 <= number <= FORMAT:
        raise CheckpointError(
            f"{path}: format is {number!r}; this version reads 1 to {FORMAT}: a newer dsc-serve wrote it, install that"
        )
    eos = generation_eos(folder / "generation_config.json")
    if eos is not None:
        content["eos_token_id"] = eos
    heads = content.get("num_attention_heads")
    if isinstance(heads, int) and heads > 0:
        content.setdefault("num_key_value_heads", heads)
        if isinstance(content.get("hidden_size"), int):
            content.setdefault("head_dim", content["hidden_size"] // heads)
    return checked_config(content, str(path))


def checked_config(content: dict[str, Any], source: str) -> ModelConfig:
    """The fields of a configuration as they stand in JSON, some of them `FieldValue`, checked.

    Raises CheckpointError naming `source` and the fields as they were read.
    """
    content, names = plain(content)
    if isinstance(content.get("eos_token_id"), list):
        content = {**content, "eos_token_id": tuple(content["eos_token_id"])}
    try:
        return ModelConfig.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{source}: {one_line(error, names)}") from None


def generation_eos(path: Path) -> list[int] | None:
    """The end-of-text tokens of `generation_config.json`, which go before those of `config.json`, as in transformers.

    Its sampling defaults are left alone: an API's defaults do not change with the model.
    """
    if not path.exists():
        return None
    eos = read_json(path).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{path}: eos_token_id is {eos!r}, expected a token id or a list of them")
    return ids or None


def stored_fields(config: ModelConfig) -> dict[str, Any]:
    """A configuration as it is written, with the lowest format number that holds it: older versions read lower ones."""
    content = config.model_dump(exclude_none=True)
    if not config.quantised:
        del content["quantised"]
    for name in (*SINCE_FORMAT_2, *SINCE_FORMAT_3):
        if content.get(name) == ModelConfig.model_fields[name].get_default(call_default_factory=True):
            content.pop(name, None)
    for ffn in (content["ffn"], *(kind["ffn"] for kind in content.get("layer_kinds", []) if "ffn" in kind)):
        if not ffn.get("bank", "there is none"):
            del ffn["bank"]
        for name in ROUTING if ffn["kind"] == "moe" else ():
            if ffn[name] == MoeConfig.model_fields[name].default:
                del ffn[name]
    newest = (
        bool(config.quantised)
        or any(name in content for name in SINCE_FORMAT_3)
        or any(name in kind for kind in content.get("layer_kinds", []) for name in KINDS_SINCE_FORMAT_3)
        or any(layer.norms == "around" or not is_plain(layer.ffn) for layer in config.kinds)
    )
    newer = (
        any(name in content for name in SINCE_FORMAT_2)
        or config.hidden_act == "gelu_tanh"
        or isinstance(config.rope_scaling, LongRope)
        or (isinstance(config.ffn, MoeConfig) and config.ffn.shared_expert is not None)
    )
    return {"format": 3 if newest else 2 if newer else 1, **content}


def save_config(config: ModelConfig, folder: Path, dtype: str) -> None:
    """Write `config.json` and `generation_config.json`; dtype is that of the stored tensors."""
    content = {**stored_fields(config), "architectures": ["DscForCausalLM"], "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", "utf8")
    tokens = {name: content[name] for name in ("bos_token_id", "eos_token_id") if name in content}
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n", "utf8")
