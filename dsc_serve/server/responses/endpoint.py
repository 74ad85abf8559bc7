"""Answers to POST /v1/responses, whole and as typed events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import Request
from fastapi.responses import Response

from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import SamplingParams, resolve_max_tokens
from dsc_serve.server.adapters import ResolvedModel
from dsc_serve.server.answer import Choice, ChoiceUpdate, ResponseFormatter, one_line
from dsc_serve.server.chat import begin, constrained, rendered_messages
from dsc_serve.server.errors import ApiError
from dsc_serve.server.limits import read_fields
from dsc_serve.server.logprobs import UntoldLogprobs, logprob_entries
from dsc_serve.server.responses.conversation import beginnings, conversation
from dsc_serve.server.responses.items import Event, ResponseOutput
from dsc_serve.server.responses.schema import ResponsesRequest
from dsc_serve.server.service import Service
from dsc_serve.server.stream import Generation
from dsc_serve.server.tools.fields import Tool
from dsc_serve.server.tools.messages import Known
from dsc_serve.server.tools.parts import Content, Part

INCOMPLETE = {"length": "max_output_tokens"}


class ResponsesFormatter(ResponseFormatter):
    """One generation, whose parts become items. The events of a stream are numbered."""

    kind = chunk_kind = "response"

    def __init__(
        self,
        service: Service,
        answer_id: str,
        fields: ResponsesRequest,
        resolved: ResolvedModel,
        names: Mapping[str, str],
    ) -> None:
        super().__init__(service, answer_id, fields, resolved)
        self.names = names
        self._output = ResponseOutput()
        self._number = 0
        self._reason = ""
        self._reasoning_tokens = 0
        self._untold = UntoldLogprobs()
        self._extension: dict[str, Any] = {}
        self._base = base_of(fields, answer_id, resolved.name)

    def is_plain(self, choice: Choice) -> bool:
        return False  # its events are numbered

    def whole(self, choice: Choice, update: ChoiceUpdate) -> dict[str, Any]:
        self._take(choice, update)
        return {}

    def pieces(self, choice: Choice, update: ChoiceUpdate) -> list[dict[str, Any]]:
        return self._take(choice, update)

    def answer(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        reason = INCOMPLETE.get(self._reason, self._reason)
        done = self._reason == "stop"
        return self._response(
            "completed" if done else "incomplete",
            incomplete_details=None if done else {"reason": reason},
            usage=self._usage(usage),
            completed_at=int(time.time()) if done else None,
        )

    def events(self, choice: Choice, update: ChoiceUpdate, usage: dict[str, Any] | None) -> bytes:
        first: list[Event] = []
        if not choice.begun:
            choice.begun = True
            response = self._response("in_progress")
            first = [{"type": f"response.{name}", "response": response} for name in ("created", "in_progress")]
        return self._told([*first, *self._take(choice, update)])

    def last_events(self, usage: dict[str, Any]) -> bytes:
        response = self.answer([], usage)
        return self._told([{"type": f"response.{response['status']}", "response": response}])

    def failed_events(self, error: ApiError, usage: dict[str, Any]) -> bytes:
        events = self._output.close("incomplete")
        facts = {"code": "server_error" if error.status >= 500 else error.code, "message": error.message}
        response = self._response("failed", error=facts, usage=self._usage(usage))
        return self._told([*events, {"type": "response.failed", "response": response}])

    def _take(self, choice: Choice, update: ChoiceUpdate) -> list[Event]:
        if choice.reader is not None:
            self._reasoning_tokens = choice.reader.reasoning_tokens
        events: list[Event] = []
        for parts, logprobs in self._portions(choice, update):
            events += self._output.add(parts, logprobs)
        if update.finish_reason is not None:
            self._reason = update.finish_reason
            self._extension = self.extension(choice, update)
            if not self._output.items:
                events += self._output.add([Content("")])
            events += self._output.close("completed" if self._reason == "stop" else "incomplete")
        return events

    def _portions(
        self, choice: Choice, update: ChoiceUpdate
    ) -> Iterator[tuple[Sequence[Part], Sequence[dict[str, Any]]]]:
        """The news in portions, each with the log probabilities of the text that it ends with."""
        entries = logprob_entries(self.service, update.logprobs)
        if choice.reader is None:
            yield [Content(text) for text in update.text if text], entries
            return
        start = 0
        for reached, entry in zip(update.reached, entries, strict=bool(entries)):
            parts = update.parts[start : reached.parts]
            told = self._untold.add(entry, reached)
            start = reached.parts
            if parts:
                yield parts, told if isinstance(parts[-1], Content) else ()
        rest, told = update.parts[start:], self._untold.rest() if update.finish_reason is not None else []
        in_text = isinstance(rest[-1], Content) if rest else self._output.in_text
        if rest or (told and in_text):
            yield rest, told if in_text else ()

    def _response(self, status: str, **facts: Any) -> dict[str, Any]:
        return {**self._base, "status": status, "output": list(self._output.items), **facts, **self._extension}

    def _told(self, events: list[Event]) -> bytes:
        told = []
        for event in events:
            name = event["type"].encode()
            told.append(b"event: %b\ndata: %b\n\n" % (name, one_line({**event, "sequence_number": self._number})))
            self._number += 1
        return b"".join(told)

    def _usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        details = {**usage["prompt_tokens_details"], "cache_write_tokens": 0}
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": details,
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }


def base_of(fields: ResponsesRequest, answer_id: str, model: str) -> dict[str, Any]:
    """What an answer says of its request."""
    form = fields.text and fields.text.format
    given = None if form is None else form.model_dump(by_alias=True, exclude_none=True)
    tools = [
        {"strict": False, "description": None, "parameters": None, **tool.model_dump(exclude_none=True)}
        for tool in fields.tools or []
    ]
    return {
        "id": answer_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": fields.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if fields.temperature is None else fields.temperature,
        "text": {"format": given or {"type": "text"}},
        "tool_choice": fields.shown_choice or "auto",
        "tools": tools,
        "top_logprobs": fields.top_logprobs or 0,
        "top_p": 1.0 if fields.top_p is None else fields.top_p,
        "truncation": fields.truncation or "disabled",
        "usage": None,
        "user": fields.user,
    }


async def create_response(service: Service, request: Request) -> Response:
    """Raises ApiError; nothing has been queued then."""
    fields = await read_fields(request, ResponsesRequest)
    resolved = await service.resolve(request, fields.model, fields.dsc)
    choice = fields.choice()
    params, names = constrained(service, fields.params(), choice, fields.names)
    known = conversation(fields)
    limit_s = fields.scheduling(service.engine.model.policy).timeout_s
    await service.grammars.check(request, params, names, limit_s)  # which may take long, so without a place
    service.admit(request, 1, "input")
    shorter = beginnings(known) if fields.truncation == "auto" else [known]
    text, prompt = await shortest_cut(service, shorter, choice.tools, params, fields.chat_template_kwargs)
    params, reading = begin(service, service.apply_limits(prompt, params, names), choice, text)
    formatter = ResponsesFormatter(service, f"resp_{uuid4().hex}", fields, resolved, names)
    choices = formatter.choices(prompt, params, reading=reading)
    return Generation(service, formatter, choices, prompt_tokens=len(prompt), stream=bool(fields.stream))


async def shortest_cut(
    service: Service,
    conversations: list[list[Known]],
    tools: tuple[Tool, ...],
    params: SamplingParams,
    variables: Mapping[str, Any] | None,
) -> tuple[str, list[int]]:
    """The first conversation that fits, rendered and as tokens; the last where none does. Raises ApiError (400)."""
    low, high = 0, len(conversations) - 1
    made: dict[int, tuple[str, list[int]]] = {}
    while True:
        middle = low if not made else (low + high) // 2
        last = middle == len(conversations) - 1
        try:
            text = await rendered_messages(service, conversations[middle], tools, param="input", variables=variables)
            made[middle] = text, await service.encode(text, "input", chat=True)
            fits = has_room(service, made[middle][1], params)
        except ApiError as error:
            if last or error.code != "context_length_exceeded":
                raise
            fits = False
        if last and middle == high:
            return made[middle]
        if fits:
            high = middle
        else:
            low = middle + 1
        if low >= high and high in made:
            return made[high]


def has_room(service: Service, prompt: list[int], params: SamplingParams) -> bool:
    try:
        resolve_max_tokens(prompt, msgspec.structs.replace(params, routing=0), service.engine.model.capacity)
    except ParameterError:
        return False
    return True
