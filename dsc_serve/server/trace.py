"""POST /v1/dsc/trace: what a prompt's tokens pick in every layer, without generating."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from uuid import uuid4

from fastapi import Request
from fastapi.responses import Response
from pydantic import Field, PlainValidator

from dsc_serve.sampling_params import ALL_ATOMS, SamplingParams
from dsc_serve.server.adapters import ResolvedModel
from dsc_serve.server.answer import Choice, ChoiceUpdate, ResponseFormatter
from dsc_serve.server.errors import bad_request
from dsc_serve.server.extensions import TopAtoms
from dsc_serve.server.limits import read_fields
from dsc_serve.server.schema import EngineFields, check_prompt
from dsc_serve.server.service import Service
from dsc_serve.server.stream import Generation

OnePrompt = str | list[int]


def check_one_prompt(value: Any) -> OnePrompt:
    prompt = check_prompt(value)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        raise bad_request("prompt", "prompt is a list of prompts; it must be one text or one list of token ids")
    return prompt  # type: ignore[return-value]  # what other lists hold has just been refused


class TraceRequest(EngineFields):
    prompt: Annotated[OnePrompt, PlainValidator(check_one_prompt, json_schema_input_type=OnePrompt)]
    top_k_atoms: TopAtoms | None = Field(
        default=None, description="only so many atoms per layer, the strongest; without it, all that a token picks"
    )

    @property
    def names(self) -> Mapping[str, str]:
        return {"routing": "prompt" if self.top_k_atoms is None else "top_k_atoms"}


class TraceFormatter(ResponseFormatter):
    kind = chunk_kind = "dsc.trace"

    def __init__(self, service: Service, answer_id: str, fields: TraceRequest, resolved: ResolvedModel) -> None:
        super().__init__(service, answer_id, fields, resolved)
        self.extended = True

    def whole(self, choice: Choice, update: ChoiceUpdate) -> dict[str, Any]:
        return self.extension(choice, update)

    def pieces(self, choice: Choice, update: ChoiceUpdate) -> list[dict[str, Any]]:
        return [self.whole(choice, update)]

    def answer(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head, "object": self.kind, **choices[0], "usage": usage}


async def create_trace(service: Service, request: Request) -> Response:
    """Raises ApiError; nothing has been queued then."""
    fields = await read_fields(request, TraceRequest)
    resolved = await service.resolve(request, fields.model, fields.dsc)
    params = SamplingParams(max_tokens=0, routing=fields.top_k_atoms or ALL_ATOMS)
    service.admit(request, 1, "prompt")
    prompt = fields.prompt
    ids = await service.encode(prompt, "prompt") if isinstance(prompt, str) else prompt
    params = service.apply_limits(ids, params, fields.names)
    formatter = TraceFormatter(service, f"trace-{uuid4().hex}", fields, resolved)
    return Generation(service, formatter, formatter.choices(ids, params), prompt_tokens=len(ids), stream=False)
