"""The OpenAPI document: what every endpoint takes and answers, with examples that run.

The framework does not know the bodies, since it does not read them.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from dsc_serve.server.answers import (
    ChatCompletion,
    Completion,
    Embeddings,
    Error,
    Health,
    Model,
    Models,
    State,
    Tenants,
    Text,
    Tokens,
    Trace,
    Version,
)
from dsc_serve.server.embeddings import EmbeddingRequest
from dsc_serve.server.fields import Fields
from dsc_serve.server.responses.described import RESPONSE_EXAMPLES, ResponseAnswer
from dsc_serve.server.responses.schema import ResponsesRequest
from dsc_serve.server.schema import ChatRequest, CompletionRequest
from dsc_serve.server.tokens import DetokenizeRequest, TokenizeRequest
from dsc_serve.server.tools.described import CALLED, SCHEMA, TOOL
from dsc_serve.server.trace import TraceRequest

TEMPLATE = "#/components/schemas/{model}"
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
