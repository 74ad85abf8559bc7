"""POST /v1/embeddings: one vector for each text, of the model's final hidden states."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from uuid import uuid4

import numpy as np
from fastapi import Request
from fastapi.responses import Response
from pydantic import Field, PlainValidator

from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import EMBEDDED, EmbeddingParams, check_embedding
from dsc_serve.server.adapters import ResolvedModel
from dsc_serve.server.answer import Choice, ChoiceUpdate, ResponseFormatter
from dsc_serve.server.completions import count_of, one_by_one
from dsc_serve.server.errors import bad_request, from_parameter
from dsc_serve.server.fields import Count
from dsc_serve.server.harmless import HarmlessFields
from dsc_serve.server.limits import read_fields
from dsc_serve.server.middleware import EXCHANGE, Exchange
from dsc_serve.server.schema import EngineFields, Prompt, Truncation, check_prompt
from dsc_serve.server.service import Service
from dsc_serve.server.stream import Generation

MAX_INPUTS = 2048  # of one request; OpenAI's limit, too
AT_ONCE = 16  # of them in the engine, so that a list of texts leaves places to others


def check_input(value: Any) -> Prompt:
    prompt = check_prompt(value, "input")
    if not prompt:
        raise bad_request("input", "input is empty; it must be a text, token ids, or a list of either")
    return prompt


class EmbeddingRequest(EngineFields, HarmlessFields):
    input: Annotated[Prompt, PlainValidator(check_input, json_schema_input_type=Prompt)]
    dimensions: Count | None = Field(default=None, description="only so many first components, normalised again")
    encoding_format: Literal["float", "base64"] | None = None
    truncate_prompt_tokens: Truncation | None = Field(default=None, description="as in a completion")

    @property
    def names(self) -> Mapping[str, str]:
        return {"prompt": "input"}


class EmbeddingFormatter(ResponseFormatter):
    kind = chunk_kind = "list"

    def __init__(self, service: Service, answer_id: str, fields: EmbeddingRequest, resolved: ResolvedModel) -> None:
        super().__init__(service, answer_id, fields, resolved)
        self._as_text = fields.encoding_format == "base64"

    def whole(self, choice: Choice, update: ChoiceUpdate) -> dict[str, Any]:
        vector = update.embedding or b""
        shown = base64.b64encode(vector).decode() if self._as_text else np.frombuffer(vector, "<f4").tolist()
        return {"object": "embedding", "index": choice.index, "embedding": shown}

    def pieces(self, choice: Choice, update: ChoiceUpdate) -> list[dict[str, Any]]:
        return [self.whole(choice, update)]

    def answer(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        counts = {name: usage[name] for name in ("prompt_tokens", "total_tokens")}
        return {"object": self.kind, "data": choices, "model": self._head["model"], "usage": counts}

    def ended(self, choice: Choice) -> None:
        self.service.metrics.embedding_ended("done" if choice.outcome == "length" else choice.outcome)


async def create_embeddings(service: Service, request: Request) -> Response:
    """Raises ApiError; nothing has been queued then."""
    fields = await read_fields(request, EmbeddingRequest)
    resolved = await service.resolve(request, fields.model, fields.dsc)
    model = service.engine.model
    if model.pooling.fault:
        raise bad_request("model", f"model cannot embed texts: {model.pooling.fault}")
    try:
        embedding = EmbeddingParams(dimensions=fields.dimensions)
        check_embedding(embedding, model.capacity)
    except ParameterError as error:
        raise from_parameter(error, fields.names) from None
    if fields.truncate_prompt_tokens == 0:
        name = "truncate_prompt_tokens"
        raise bad_request(name, f"{name} is 0; it must be at least 1, or -1 for as many as fit")
    count = count_of(fields.input)
    if count > MAX_INPUTS:
        raise bad_request("input", f"input has {count} texts; one request may have at most {MAX_INPUTS}")
    exchange: Exchange = request.scope[EXCHANGE]
    most = min(service.permits.capacity, exchange.lease.streams or AT_ONCE, AT_ONCE)
    at_once = min(count, most)
    service.admit(request, at_once, "input")
    formatter = EmbeddingFormatter(service, f"embd-{uuid4().hex}", fields, resolved)
    choices: list[Choice] = []
    prompt_tokens = 0
    for name, text in one_by_one(fields.input, "input").items():
        if choices:
            await asyncio.sleep(0)  # many texts take a while: let the tokens of other requests pass
        ids = await service.tokens(text, name, EMBEDDED, fields.truncate_prompt_tokens)
        params = service.apply_limits(ids, EMBEDDED, {**fields.names, "prompt": name})
        (choice,) = formatter.choices(ids, params, len(choices))
        choice.embedding = embedding
        choices.append(choice)
        prompt_tokens += len(ids)
    return Generation(service, formatter, choices, prompt_tokens=prompt_tokens, stream=False, at_once=at_once)
