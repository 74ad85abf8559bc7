"""What a caller may ask of one generation. Shared by the Python API, the server and the engine; free of torch."""

from __future__ import annotations

import math

import msgspec

from dsc_serve.kv_layout import ALL, KvLayout
from dsc_serve.parameter_errors import ContextLengthError, ParameterError, reject
from dsc_serve.structured_outputs import StructuredOutputs

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP = 1024  # characters of one
MAX_STOP_TOKENS = 1024
MAX_CHOICES = 128  # n
MAX_BIASES = 1024
MAX_PREDICTION = 2**20  # tokens
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 100.0
INT32_MAX = 2**31 - 1
ALL_ATOMS = -1
MAX_PICKS = 2**20  # that one request may have reported


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens and when to stop."""

    # 0 takes the most likely token; else logits are divided by it. Below 0.001 it is taken for 0, since nothing but the
    # most likely token would ever be drawn.
    temperature: float = 1.0
    top_p: float = 1.0  # only the smallest set of most likely tokens whose probability reaches p, after top_k
    top_k: int = 0  # only the k most likely tokens (0 or -1: all)
    min_p: float = 0.0  # only tokens at least min_p times as likely as the most likely one
    presence_penalty: float = 0.0  # subtracted from the logits of generated tokens, once
    frequency_penalty: float = 0.0  # the same, per occurrence
    # Divides positive and multiplies negative logits of tokens in the prompt or generated
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}  # added to the logits of the given token ids, before everything else
    # The token at a position depends on the logits, the seed and the position alone; None draws a seed
    seed: int | None = None
    max_tokens: int | None = 16  # most tokens to generate; None means up to the context's end
    # The end of text and stop tokens cannot be chosen before this many tokens, nor do stop strings count
    min_tokens: int = 0
    stop: tuple[str, ...] = ()  # texts that end the generation and are left out of it
    stop_token_ids: tuple[int, ...] = ()  # tokens that end it
    ignore_eos: bool = False  # whether the end of text ends nothing
    skip_special_tokens: bool = True  # whether they are left out of the text
    # Report the chosen token's log probability and that many alternatives (None: nothing), of the model's own
    # distribution, before temperature and filters
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    n: int = 1  # number of independent generations
    # Report, for each token that is computed, so many of the atoms it picks in each layer, the strongest (0: nothing,
    # -1: all it picks)
    routing: int = 0
    # What much of the output is expected to be; it makes the answer faster, not another one
    prediction_token_ids: tuple[int, ...] = ()
    # Of the tokens that may follow, most that a step computes with the request's own (None: the engine's)
    max_drafts: int | None = None
    # What the text must look like. Tokens that cannot follow are never chosen; the generation ends where nothing more
    # may follow. Stop strings and stop tokens cut the text wherever they appear in it.
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        self._check_types()
        for field in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                reject(field, value, "a finite number")
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            reject("temperature", self.temperature, f"0 (greedy) or above, and at most {MAX_TEMPERATURE:g}")
        if self.temperature < MIN_TEMPERATURE:
            msgspec.structs.force_setattr(self, "temperature", 0.0)
        if not 0 < self.top_p <= 1:
            reject("top_p", self.top_p, "above 0 and at most 1")
        if not -1 <= self.top_k <= INT32_MAX:
            reject("top_k", self.top_k, "-1 or 0 (all tokens) or a positive 32-bit integer")
        if not 0 <= self.min_p <= 1:
            reject("min_p", self.min_p, "between 0 and 1")
        for field in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, field) <= 2:
                reject(field, getattr(self, field), "between -2 and 2")
        if not 0 < self.repetition_penalty <= 100:
            reject("repetition_penalty", self.repetition_penalty, "above 0 and at most 100")
        if len(self.logit_bias) > MAX_BIASES:
            reject("logit_bias", f"{len(self.logit_bias)} entries", f"at most {MAX_BIASES}")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0:
                reject("logit_bias", token, "a map from token ids (integers from 0) to numbers")
            if not math.isfinite(bias) or not -100 <= bias <= 100:
                reject("logit_bias", bias, "a map to numbers between -100 and 100")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            reject("seed", self.seed, "a 64-bit integer")
        if self.max_tokens is not None and not 0 <= self.max_tokens <= INT32_MAX:
            reject("max_tokens", self.max_tokens, "a 32-bit integer from 0")
        if not 0 <= self.min_tokens <= INT32_MAX or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            reject("min_tokens", self.min_tokens, f"between 0 and max_tokens ({self.max_tokens})")
        if len(self.stop) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP for s in self.stop):
            reject("stop", list(self.stop), f"at most {MAX_STOPS} texts of 1 to {MAX_STOP} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            reject("stop_token_ids", f"{len(self.stop_token_ids)} ids", f"at most {MAX_STOP_TOKENS}")
        if not all(type(t) is int and t >= 0 for t in self.stop_token_ids):
            reject("stop_token_ids", list(self.stop_token_ids), "token ids (integers from 0)")
        predicted = self.prediction_token_ids
        if len(predicted) > MAX_PREDICTION or not all(type(t) is int and t >= 0 for t in predicted):
            reject("prediction_token_ids", f"{len(predicted)} values", f"at most {MAX_PREDICTION} token ids from 0")
        for field, most in (("logprobs", MAX_LOGPROBS), ("prompt_logprobs", MAX_LOGPROBS), ("max_drafts", INT32_MAX)):
            value = getattr(self, field)
            if value is not None and not 0 <= value <= most:
                reject(field, value, f"between 0 and {most}")
        if not 1 <= self.n <= MAX_CHOICES:
            reject("n", self.n, f"between 1 and {MAX_CHOICES}")
        if not ALL_ATOMS <= self.routing <= INT32_MAX:
            reject("routing", self.routing, "-1 (all atoms), 0 (none) or more")
        if self.structured_outputs is not None:
            if not isinstance(self.structured_outputs, StructuredOutputs):
                reject("structured_outputs", self.structured_outputs, "StructuredOutputs or None")
            for field, neutral in (("ignore_eos", False), ("min_tokens", 0)):
                if getattr(self, field) != neutral:
                    reject(field, getattr(self, field), f"{neutral} where structured_outputs decides when a text ends")

    def _check_types(self) -> None:
        """Python does not hold callers to annotations, and a wrong type must not fail inside a step."""
        for field in ("top_k", "min_tokens", "n", "routing"):
            if type(getattr(self, field)) is not int:
                reject(field, getattr(self, field), "an integer")
        for field in ("seed", "max_tokens", "logprobs", "prompt_logprobs", "max_drafts"):
            value = getattr(self, field)
            if value is not None and type(value) is not int:
                reject(field, value, "an integer or None")
        for field in ("ignore_eos", "skip_special_tokens"):
            if type(getattr(self, field)) is not bool:
                reject(field, getattr(self, field), "True or False")
        for field in ("stop", "stop_token_ids", "prediction_token_ids"):
            if not isinstance(getattr(self, field), tuple | list):
                reject(field, getattr(self, field), "a sequence of " + ("texts" if field == "stop" else "token ids"))
        if not isinstance(self.logit_bias, dict):
            reject("logit_bias", self.logit_bias, "a map from token ids to numbers")
        for bias in self.logit_bias.values():
            if not isinstance(bias, int | float) or isinstance(bias, bool):
                reject("logit_bias", bias, "a map to numbers between -100 and 100")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def for_choice(self, index: int) -> SamplingParams:
        """The parameters of choice `index` of `n` as a request of its own: n is 1 and the seed its own.

        Choice 0 keeps the seed, so that it equals the same request with n = 1.
        """
        seed = self.seed
        if seed is not None and index > 0:
            seed = (seed + index * 0x9E3779B97F4A7C15) % 2**64
        return msgspec.structs.replace(self, n=1, seed=seed)


class EmbeddingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a text becomes a vector."""

    dimensions: int | None = None  # only so many of its first components (None: all), normalised again

    def __post_init__(self) -> None:
        if self.dimensions is not None and (type(self.dimensions) is not int or self.dimensions < 1):
            reject("dimensions", self.dimensions, "a positive integer or None")


EMBEDDED = SamplingParams(temperature=0, max_tokens=0)  # how much a request generates that asks for a vector


class EngineCapacity(msgspec.Struct, frozen=True):
    """What one engine can hold."""

    vocab_size: int
    max_model_len: int  # the model's context
    num_blocks: int  # of the KV pool
    block_size: int  # tokens in one
    picks: str = ""  # what tokens pick in a layer: atoms, experts or adapters; "": nothing that is told
    picking: tuple[int, ...] = ()  # the layers in which they do
    picks_per_token: int = 0  # in each of these
    pickable: int = 0  # atoms, experts or adapters that there are in each
    hidden_size: int = 0  # components of an embedding
    max_drafts: int = 0  # of one request in a step; 0: none are computed
    kv_windows: tuple[int, ...] = ALL  # of the groups of layers, as in `KvLayout`
    step_tokens: int = 0  # most that a step computes

    @property
    def max_tokens(self) -> int:
        """Tokens, prompt and output together, that one request can ever have."""
        layout = KvLayout(self.block_size, self.kv_windows)
        return layout.tokens_within(self.num_blocks, self.max_model_len, self.step_tokens)


def resolve_max_tokens(prompt: list[int], params: SamplingParams, capacity: EngineCapacity) -> int:
    """The number of tokens the request may generate, checked against what the engine can ever hold.

    The one place where a request is measured: the HTTP server asks before it queues, the engine before it admits, so
    nothing is admitted that could never finish. Raises ParameterError.
    """
    if not prompt:
        raise ParameterError("prompt", "prompt is empty; at least one token is needed")
    limit, size = capacity.max_tokens, len(prompt)
    what = "the model's context" if limit == capacity.max_model_len else "the KV pool"
    note = "" if limit == capacity.max_model_len else f" ({what} holds {limit})"
    if size > limit:
        message = f"prompt has {size} tokens; {what} holds {limit}"
        raise ContextLengthError("prompt", message, limit, size, params.max_tokens or None, note)
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= capacity.vocab_size:
        bad = low if low < 0 else high
        raise ParameterError("prompt", f"prompt holds token id {bad}; allowed: 0 to {capacity.vocab_size - 1}")
    for field in ("logit_bias", "stop_token_ids", "prediction_token_ids"):
        ids = getattr(params, field)
        if ids and max(ids) >= capacity.vocab_size:
            raise ParameterError(field, f"{field} holds token id {max(ids)}; allowed: 0 to {capacity.vocab_size - 1}")
    if params.prediction_token_ids and not capacity.max_drafts:
        what = "prediction_token_ids is set; it would do nothing, since speculation is off here"
        raise ParameterError("prediction_token_ids", what)
    if (params.max_drafts or 0) > capacity.max_drafts:
        reject("max_drafts", params.max_drafts, f"at most {capacity.max_drafts}, as this engine was started")
    if params.routing:
        check_routing(prompt, params, capacity)
    room = limit - size
    if params.max_tokens is None:
        if room == 0:
            message = f"prompt has {size} tokens and fills {what}; none can be generated"
            raise ContextLengthError("prompt", message, limit, size, 1, note)
        if params.min_tokens > room:
            reject("min_tokens", params.min_tokens, f"at most {room}, what is left after the prompt")
        return room
    if params.max_tokens > room:
        message = (
            f"max_tokens is {params.max_tokens} and the prompt has {size} tokens; together they may be at most {limit} "
            f"({what})"
        )
        raise ContextLengthError("max_tokens", message, limit, size, params.max_tokens, note)
    return params.max_tokens


def check_embedding(params: EmbeddingParams, capacity: EngineCapacity) -> None:
    """Raises ParameterError where the model's vectors have fewer components than are asked for."""
    if params.dimensions is not None and params.dimensions > capacity.hidden_size:
        reject(
            "dimensions", params.dimensions, f"between 1 and {capacity.hidden_size}, which this model's vectors have"
        )


def check_routing(prompt: list[int], params: SamplingParams, capacity: EngineCapacity) -> None:
    """Raises ParameterError where a request's picks cannot be reported."""
    most, layers, what = capacity.picks_per_token, len(capacity.picking), capacity.picks
    if not most:
        told = "this model's tokens pick nothing, neither atoms nor experts nor adapters of a mixture"
        raise ParameterError("routing", f"routing cannot be reported: {told}")
    if params.routing > most:
        reject("routing", params.routing, f"at most {most}, the {what} that a token picks")
    tokens = capacity.max_tokens if params.max_tokens is None else len(prompt) + params.max_tokens
    count = most if params.routing == ALL_ATOMS else params.routing
    picks = tokens * layers * count
    if picks > MAX_PICKS:
        raise ParameterError(
            "routing",
            f"routing of {count} {what} for up to {tokens} tokens in {layers} layers is {picks} picks; at most "
            f"{MAX_PICKS} are reported: lower max_tokens or ask for fewer {what}",
        )
