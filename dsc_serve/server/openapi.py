"""The OpenAPI document: what every endpoint takes and answers, with examples that run.

The framework does not know the bodies, since it does not read them.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from dsc_serve.server.embeddings import EmbeddingRequest
from dsc_serve.server.fields import Fields
from dsc_serve.server.responses.described import RESPONSE_EXAMPLES, ResponseAnswer
from dsc_serve.server.responses.schema import ResponsesRequest
from dsc_serve.server.schema import ChatRequest, CompletionRequest
from dsc_serve.server.tokens import DetokenizeRequest, TokenizeRequest
from dsc_serve.server.tools.described import CALLED, SCHEMA, TOOL, ToolCall
from dsc_serve.server.trace import TraceRequest

TEMPLATE = "#/components/schemas/{model}"
FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorFacts(Answer):
    """`param` names the field to blame, `code` says what is wrong with it."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    error: ErrorFacts


class PromptTokensDetails(Answer):
    cached_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Routing(Answer):
    """Lists over tokens, layers and picks: what the tokens from position `start` on picked, the strongest first.

    Of DSC layers `atoms` with their `coefficients`; of a mixture `experts`, or `adapters`, with their `gates`, and
    `signal` is the largest of these.
    """

    start: int
    token_ids: list[int]
    atoms: list[list[list[int]]] | None = None
    coefficients: list[list[list[float]]] | None = None
    experts: list[list[list[int]]] | None = None
    adapters: list[list[list[int]]] | None = None
    gates: list[list[list[float]]] | None = None
    signal: list[list[float]]


class Timings(Answer):
    """null where there were too few tokens to tell."""

    queue_ms: float
    ttft_ms: float | None
    mean_itl_ms: float | None
    max_itl_ms: float | None
    cached_tokens: int


class Dsc(Answer):
    """finish_reason: this server's own, where it may say more than OpenAI's five do."""

    finish_reason: Literal["stop", "length", "timeout"] | None = None
    routing: Routing | None = None
    timings: Timings | None = None


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """`token_ids` where the model has no tokenizer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    dsc: Dsc | None = None


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[ChatLogprob]
    refusal: None


class AssistantMessage(Answer):
    role: Literal["assistant"]
    """reasoning_content and tool_calls: only where there are some; content is null beside calls without text."""

    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: str | int | None
    dsc: Dsc | None = None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Trace(Answer):
    id: str
    object: Literal["dsc.trace"]
    created: int
    model: str
    dsc: Dsc
    usage: Usage


class Embedding(Answer):
    """`embedding` is a list of numbers or, where `encoding_format` is base64, float32 in little-endian order."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Answer):
    """token_strs: where asked for."""

    prompt: str
    token_strs: list[str] | None = None


class Version(Answer):
    version: str


class ModelDsc(Answer):
    """What a token picks: `atoms_per_token` of the `atoms` in each of the `layers`."""

    layers: int
    atoms: int
    atoms_per_token: int


class ModelAdapter(Answer):
    """bytes: in memory. Kind and sizes are known once an adapter has been read. error: why it cannot be used."""

    kind: str | None
    rank: int
    modules: int
    bytes: int
    loaded: bool
    error: str | None


class ModelPicks(Answer):
    """What a token picks: `per_token` of the `number` atoms, experts or adapters in each of these layers."""

    of: Literal["atoms", "experts", "adapters"]
    layers: list[int]
    number: int
    per_token: int


class Model(Answer):
    """dsc: null where the model has no DSC layers. picks: null where its tokens pick nothing.

    parent: of an adapter, its base; root: the digest of its content.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    root: str | None
    max_model_len: int
    tool_calls: str
    reasoning: bool
    dsc: ModelDsc | None
    picks: ModelPicks | None
    adapter: ModelAdapter | None


class Models(Answer):
    object: Literal["list"]
    data: list[Model]


class Health(Answer):
    status: Literal["ok"]


class EngineState(Answer):
    alive: bool
    trouble: str
    restarts: int


class Places(Answer):
    held: int
    capacity: int


class State(Answer):
    engine: EngineState
    draining: bool
    places: Places
    generations_by_key: dict[str, int]


class TenantUse(Answer):
    name: str
    digest: str
    certificate: list[float]
    bound: list[float]
    tokens: int
    signal: float
    distinct: list[int]
    overlap: dict[str, float]


class Tenants(Answer):
    layers: list[int]
    atoms: int
    atoms_per_token: int
    bank: str
    shared: list[int]
    tenants: list[TenantUse]


BODIES: dict[str, type[Fields]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/dsc/trace": TraceRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": ChatCompletion,
    "/v1/embeddings": Embeddings,
    "/v1/responses": ResponseAnswer,
    "/v1/dsc/trace": Trace,
    "/tokenize": Tokens,
    "/detokenize": Text,
    "/version": Version,
    "/v1/models": Models,
    "/v1/models/{name}": Model,
    "/health": Health,
    "/health/live": Health,
    "/health/ready": Health,
    "/admin/state": State,
    "/admin/tenants": Tenants,
}
STREAMED = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses"})
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Who?"}]}]
EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/completions": {
        "text": {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0.7, "seed": 1},
        "stream": {"prompt": "Once", "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}},
        "token ids, several prompts": {"prompt": [[11, 12], [13]], "max_tokens": 4, "n": 2, "logprobs": 2},
        "regex": {"prompt": "Call", "max_tokens": 16, "structured_outputs": {"regex": "[0-9]{3}-[0-9]{4}"}},
        "routing": {"prompt": "Once", "max_tokens": 2, "dsc": {"return_routing": True, "top_k_atoms": 2}},
    },
    "/v1/chat/completions": {
        "chat": {"messages": CHAT, "max_completion_tokens": 16},
        "stream": {"messages": CHAT, "max_completion_tokens": 4, "stream": True},
        "JSON schema": {
            "messages": CHAT,
            "max_completion_tokens": 40,
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
        },
        "choice": {"messages": CHAT, "structured_outputs": {"choice": ["Peter", "Paul"]}},
        "deadline": {"messages": CHAT, "max_completion_tokens": 4, "dsc": {"deadline_ms": 60000}},
        "tool": {"messages": CHAT, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        "result of a tool": {"messages": [*CHAT, *CALLED], "tools": [TOOL], "max_completion_tokens": 4},
    },
    "/v1/embeddings": {
        "text": {"input": "Once upon a time"},
        "texts, cut": {"input": ["Once", "Twice"], "dimensions": 4, "encoding_format": "base64"},
        "token ids": {"input": [[11, 12], [13]]},
    },
    "/v1/responses": RESPONSE_EXAMPLES,
    "/v1/dsc/trace": {"text": {"prompt": "Once upon a time"}, "token ids": {"prompt": [11, 12], "top_k_atoms": 1}},
    "/tokenize": {"prompt": {"prompt": "Once", "return_token_strs": True}, "messages": {"messages": CHAT}},
    "/detokenize": {"token ids": {"tokens": [11, 12]}, "each": {"tokens": [11, 12], "return_token_strs": True}},
}

ERRORS = {
    "400": "A field, a header or the body cannot be used; `param` names it.",
    "401": "There is no API key, or it is not known here.",
    "403": "The key is not allowed to do this.",
    "404": "There is no such model or route.",
    "405": "The route has other methods.",
    "408": "The body did not come in time, or the request's own time ran out before it began to answer.",
    "413": "The body is too large.",
    "429": "The server is full, or the key has used up what it may; `Retry-After` says when to try again.",
    "431": "The headers are too large.",
    "500": "The server or the engine failed on this request.",
    "503": "The engine is down, or the server is shutting down.",
}


def reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": TEMPLATE.format(model=model.__name__)}


def describe(app: FastAPI, root_path: str) -> dict[str, Any]:
    """The OpenAPI document of an app. root_path: its path behind a proxy, if it has one."""
    servers: list[dict[str, str | Any]] | None = [{"url": root_path}] if root_path else None
    document = get_openapi(title=app.title, version=app.version, routes=app.routes, servers=servers)
    for path, item in document["paths"].items():
        name = path.replace(":path}", "}")
        for operation in item.values():
            operation["responses"] = responses(name)
            if name in BODIES:
                examples = {key: {"value": value} for key, value in EXAMPLES[name].items()}
                content = {"schema": reference(BODIES[name]), "examples": examples}
                operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    known: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in BODIES.values()]
    answers: list[type[BaseModel]] = [*ANSWERS.values(), Error]
    known += [(model, "serialization") for model in answers]
    _, definitions = models_json_schema(known, ref_template=TEMPLATE)
    document["components"] = {"schemas": definitions["$defs"]}
    return document


def responses(path: str) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if path in ANSWERS:
        content = {"application/json": {"schema": reference(ANSWERS[path])}}
    if path in STREAMED:
        content["text/event-stream"] = {}  # its events are chunks of OpenAI's form, and at last [DONE]
    failed = {"application/json": {"schema": reference(Error)}}
    return {
        "200": {"description": "The answer.", "content": content},
        **{status: {"description": text, "content": failed} for status, text in ERRORS.items()},
    }
