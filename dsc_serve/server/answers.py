"""What endpoints answer, as the OpenAPI document describes it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dsc_serve.server.tools.described import ToolCall

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class AnswerModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorFacts(AnswerModel):
    message: str
    type: str
    param: str | None = Field(description="the field to blame")
    code: str | None = Field(description="what is wrong with it")


class Error(AnswerModel):
    error: ErrorFacts


class PromptTokensDetails(AnswerModel):
    cached_tokens: int


class Usage(AnswerModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Routing(AnswerModel):
    """Lists over tokens, layers and picks: what the tokens from position `start` on picked, the strongest first."""

    start: int
    token_ids: list[int]
    atoms: list[list[list[int]]] | None = Field(default=None, description="of DSC layers")
    coefficients: list[list[list[float]]] | None = Field(default=None, description="the atoms'")
    experts: list[list[list[int]]] | None = Field(default=None, description="of a mixture")
    adapters: list[list[list[int]]] | None = Field(default=None, description="of a mixture of LoRAs")
    gates: list[list[list[float]]] | None = Field(default=None, description="the experts', or the adapters'")
    signal: list[list[float]] = Field(description="of a mixture the largest of its gates")


class Timings(AnswerModel):
    """null where there were too few tokens to tell."""

    queue_ms: float
    ttft_ms: float | None
    mean_itl_ms: float | None
    max_itl_ms: float | None
    cached_tokens: int


class Dsc(AnswerModel):
    """This server's own."""

    finish_reason: Literal["stop", "length", "timeout"] | None = Field(
        default=None, description="where it may say more than OpenAI's five do"
    )
    routing: Routing | None = None
    timings: Timings | None = None


class CompletionLogprobs(AnswerModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(AnswerModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: list[int] | None = Field(default=None, description="where the model has no tokenizer")
    dsc: Dsc | None = None


class Completion(AnswerModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(AnswerModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(AnswerModel):
    content: list[ChatLogprob]
    refusal: None


class AssistantMessage(AnswerModel):
    role: Literal["assistant"]
    content: str | None = Field(description="null beside calls without text")
    refusal: None
    reasoning_content: str | None = Field(default=None, description="only where there is some")
    tool_calls: list[ToolCall] | None = Field(default=None, description="only where there are some")


class ChatChoice(AnswerModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: str | int | None
    dsc: Dsc | None = None


class ChatCompletion(AnswerModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Trace(AnswerModel):
    id: str
    object: Literal["dsc.trace"]
    created: int
    model: str
    dsc: Dsc
    usage: Usage


class Embedding(AnswerModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(
        description="a list of numbers or, where `encoding_format` is base64, float32 in little-endian order"
    )


class EmbeddingUsage(AnswerModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(AnswerModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(AnswerModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(AnswerModel):
    prompt: str
    token_strs: list[str] | None = Field(default=None, description="where asked for")


class Version(AnswerModel):
    version: str


class ModelDsc(AnswerModel):
    """What a token picks: `atoms_per_token` of the `atoms` in each of the `layers`."""

    layers: int
    atoms: int
    atoms_per_token: int


class ModelAdapter(AnswerModel):
    """Kind and sizes are known once an adapter has been read."""

    kind: str | None
    rank: int
    modules: int
    bytes: int = Field(description="in memory")
    loaded: bool
    error: str | None = Field(description="why it cannot be used")


class ModelPicks(AnswerModel):
    """What a token picks: `per_token` of the `number` atoms, experts or adapters in each of these layers."""

    of: Literal["atoms", "experts", "adapters"]
    layers: list[int]
    number: int
    per_token: int


class Model(AnswerModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = Field(description="of an adapter, its base")
    root: str | None = Field(description="of an adapter, the digest of its content")
    max_model_len: int
    tool_calls: str
    reasoning: bool
    dsc: ModelDsc | None = Field(description="null where the model has no DSC layers")
    picks: ModelPicks | None = Field(description="null where its tokens pick nothing")
    adapter: ModelAdapter | None


class Models(AnswerModel):
    object: Literal["list"]
    data: list[Model]


class Health(AnswerModel):
    status: Literal["ok"]


class EngineState(AnswerModel):
    alive: bool
    trouble: str
    restarts: int


class Places(AnswerModel):
    held: int
    capacity: int


class State(AnswerModel):
    engine: EngineState
    draining: bool
    places: Places
    generations_by_key: dict[str, int]


class TenantUse(AnswerModel):
    name: str
    digest: str
    certificate: list[float]
    bound: list[float]
    tokens: int
    signal: float
    distinct: list[int]
    overlap: dict[str, float]


class Tenants(AnswerModel):
    layers: list[int]
    atoms: int
    atoms_per_token: int
    bank: str
    shared: list[int]
    tenants: list[TenantUse]
