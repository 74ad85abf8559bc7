"""What is answered: the choices of a request, their news, and the shape an endpoint gives them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import msgspec

from dsc_serve.sampling_params import ParameterError, SamplingParams
from dsc_serve.server.errors import from_parameter
from dsc_serve.server.extensions import GenerationTimes, routing_entry
from dsc_serve.server.schema import EngineFields
from dsc_serve.server.service import Service
from dsc_serve.text.stream import TextStream
from dsc_serve.worker.messages import Delta, RoutingSlice, TokenLogprobs

LOWEST_LOGPROB = -9999.0  # JSON has no infinity

MARK = uuid4().hex  # where an event that is made beforehand has room for a text
# Clients that cut an answer into lines as Python cuts texts would cut an event in two at these.
LINE_ENDS = {end.encode(): b"\\u%04x" % ord(end) for end in "\x85\u2028\u2029"}

encode = msgspec.json.Encoder().encode


def one_line(data: object) -> bytes:
    """The data as JSON that no client cuts into lines."""
    text = encode(data)
    if not text.isascii():
        for end, escaped in LINE_ENDS.items():
            text = text.replace(end, escaped)
    return text


def event(data: object) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % one_line(data)


@dataclass(slots=True)
class Choice:
    """One generation."""

    index: int
    request_id: str
    prompt: list[int]
    params: SamplingParams
    text: TextStream
    echo: str | None = None  # the prompt's text, where the answer begins with it
    begun: bool = False
    told: int = 0  # tokens that log probabilities have been reported for
    characters: int = 0  # of its text, that these stand for
    cached_tokens: int = 0  # of its prompt
    predicted: tuple[int, int] = (0, 0)  # tokens of its prediction that were tried: right ones, and wrong ones
    outcome: str = "error"  # why it ended; "error" where nobody says why
    clock: GenerationTimes = field(default_factory=GenerationTimes)
    frame: tuple[bytes, bytes] | None = None  # around the text of an event of nothing but text


@dataclass(slots=True)
class ChoiceUpdate:
    """What a choice has to say: everything when it is answered whole, else what came since its last event."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # of the prompt, where asked for, then of it
    routing: list[RoutingSlice] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta, text: str, kept: int, finish_reason: str | None) -> None:
        """Take in a delta: the text that it added, and its first `kept` tokens, which are those before a stop."""
        self.text.append(text)
        self.token_ids.extend(delta.token_ids[:kept])
        if delta.prompt_logprobs:
            self.logprobs.extend(delta.prompt_logprobs)
        if delta.logprobs:
            self.logprobs.extend(delta.logprobs[:kept])
        if delta.routing is not None:
            self.routing.append(delta.routing)
        self.finish_reason = finish_reason


class ResponseFormatter(ABC):
    """How an endpoint writes its answers."""

    kind: str
    chunk_kind: str

    def __init__(self, service: Service, answer_id: str, fields: EngineFields) -> None:
        self.service = service
        self.names = fields.names
        self.include_usage, self.continuous_usage = fields.include_usage, fields.continuous_usage
        self.id = answer_id
        self.user = fields.user
        self.scheduling = fields.scheduling(service.engine.model.policy)
        self.extended = fields.dsc is not None
        self._head = {"id": answer_id, "created": int(time.time()), "model": service.model_name}

    def choices(
        self, prompt: list[int], params: SamplingParams, start: int = 0, echo: str | None = None
    ) -> list[Choice]:
        """The `params.n` choices of one prompt, numbered from `start`. Raises ApiError (400)."""
        choices = []
        for i in range(params.n):
            own = params.for_choice(i)
            try:
                text = TextStream(self.service.tokenizer, prompt, own)
            except ParameterError as error:
                raise from_parameter(error, self.names) from None
            request_id = f"{self.id}-{start // params.n}-{i}"
            choices.append(Choice(start + i, request_id, prompt, own, text, echo))
        return choices

    def extension(self, choice: Choice, update: ChoiceUpdate) -> dict[str, Any]:
        """The `dsc` object of an entry of `choices` as a dict to merge in, empty where it was not asked for."""
        if not self.extended:
            return {}
        entry: dict[str, Any] = {}
        routing = routing_entry(update.routing, choice.prompt, choice.text.kept_tokens)
        if routing is not None:
            entry["routing"] = routing
        if update.finish_reason is not None:
            entry["timings"] = choice.clock.timings(choice.cached_tokens)
        return {"dsc": entry} if entry else {}

    @abstractmethod
    def whole(self, choice: Choice, update: ChoiceUpdate) -> dict[str, Any]:
        """An entry of `choices` in a whole answer."""

    @abstractmethod
    def pieces(self, choice: Choice, update: ChoiceUpdate) -> list[dict[str, Any]]:
        """Entries of `choices`, one for each event that tells the news."""

    def answer(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def events(self, choice: Choice, update: ChoiceUpdate, usage: dict[str, Any] | None) -> bytes:
        return b"".join([event(self._chunk([piece], usage)) for piece in self.pieces(choice, update)])

    def is_plain(self, choice: Choice) -> bool:
        """Whether the events between a choice's first and its last differ in nothing but their text."""
        params = choice.params
        reporting = params.logprobs is not None or params.prompt_logprobs is not None or params.routing != 0
        return self.service.tokenizer is not None and not reporting and not self.continuous_usage

    def text_event(self, choice: Choice, text: str) -> bytes:
        """As `events` for a text alone, of a plain choice that has begun: made once and then filled in."""
        if choice.frame is None:
            before, after = self.events(choice, ChoiceUpdate([MARK]), None).split(encode(MARK))
            choice.frame = before, after
        before, after = choice.frame
        return before + one_line(text) + after

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return event(self._chunk([], usage)) if self.include_usage else b""

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_kind, "choices": choices}
        if self.include_usage:
            chunk["usage"] = usage
        return chunk
