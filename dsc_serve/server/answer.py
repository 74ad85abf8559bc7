"""What is answered: the choices of a request, their news, and the shape an endpoint gives them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec

from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import EmbeddingParams, SamplingParams
from dsc_serve.server.adapters import ResolvedModel
from dsc_serve.server.errors import ApiError, from_parameter
from dsc_serve.server.extensions import GenerationTimes, routing_entry
from dsc_serve.server.schema import EngineFields
from dsc_serve.server.service import Service
from dsc_serve.server.tools.dialect import ReaderOptions
from dsc_serve.server.tools.parts import Part
from dsc_serve.server.tools.reader import AnswerReader
from dsc_serve.text.stream import TextStream
from dsc_serve.worker.client import Family
from dsc_serve.worker.messages import Delta, RoutingSlice, TokenLogprobs

DONE = b"data: [DONE]\n\n"
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
    family: Family  # all choices of the same prompt
    embedding: EmbeddingParams | None = None  # where its prompt's vector is asked for
    reader: AnswerReader | None = None  # where the text has parts
    echo: str | None = None  # the prompt's text, where the answer begins with it
    begun: bool = False
    told: int = 0  # tokens that log probabilities have been reported for
    characters: int = 0  # of its text, that these stand for
    cached_tokens: int = 0  # of its prompt
    predicted: tuple[int, int] = (0, 0)  # tokens of its prediction that were tried: right ones, and wrong ones
    outcome: str = "error"  # why it ended; "error" where nobody says why
    clock: GenerationTimes = field(default_factory=GenerationTimes)
    frame: tuple[bytes, bytes] | None = None  # around the text of an event of nothing but text

    def count(self, delta: Delta) -> None:
        """Take in what a delta says of the choice beside its tokens."""
        self.outcome = delta.finish_reason or self.outcome
        if delta.cached_tokens > self.cached_tokens:
            self.cached_tokens = delta.cached_tokens
        right, wrong = delta.prediction
        if right or wrong:
            self.predicted = self.predicted[0] + right, self.predicted[1] + wrong


class Reached(NamedTuple):
    """How far the parts of an answer have come with a token."""

    parts: int  # of the update so far
    added: int  # characters of the answer's text that the token brought
    held: int  # of all so far, those of which no part has been made yet


@dataclass(slots=True)
class ChoiceUpdate:
    """What a choice has to say: everything when it is answered whole, else what came since its last event."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # of the prompt, where asked for, then of it
    routing: list[RoutingSlice] = field(default_factory=list)
    embedding: bytes | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop text or stop token that ended it
    parts: list[Part] = field(default_factory=list)  # instead of `text` where there is a reader
    reached: list[Reached] = field(default_factory=list)  # and how far they had come with each token

    @property
    def openai_reason(self) -> str | None:
        """Why it ended as OpenAI's clients know it: one that is out of time was cut short."""
        return "length" if self.finish_reason == "timeout" else self.finish_reason

    @property
    def has_news(self) -> bool:
        return bool(self.parts) or any(self.text)

    def echo(self, text: str, prompt: list[int]) -> None:
        """Begin with the prompt."""
        self.text.append(text)
        self.token_ids.extend(prompt)

    def add(self, delta: Delta, kept: int) -> None:
        """Take in a delta but for its text: of its tokens the first `kept`, which are those before a stop."""
        self.token_ids.extend(delta.token_ids[:kept])
        if delta.prompt_logprobs:
            self.logprobs.extend(delta.prompt_logprobs)
        if delta.logprobs:
            self.logprobs.extend(delta.logprobs[:kept])
        if delta.routing is not None:
            self.routing.append(delta.routing)
        self.embedding = delta.embedding or self.embedding
        self.finish_reason = delta.finish_reason


class ResponseFormatter(ABC):
    """How an endpoint writes its answers."""

    kind: str
    chunk_kind: str

    def __init__(self, service: Service, answer_id: str, fields: EngineFields, resolved: ResolvedModel) -> None:
        self.service, self.resolved = service, resolved
        self.names = fields.names
        self.include_usage, self.continuous_usage = fields.include_usage, fields.continuous_usage
        self.id = answer_id
        self.user = fields.user
        self.scheduling = fields.scheduling(service.engine.model.policy)
        self.extended = fields.dsc is not None
        self._head = {"id": answer_id, "created": int(time.time()), "model": resolved.name}

    def choices(
        self,
        prompt: list[int],
        params: SamplingParams,
        start: int = 0,
        echo: str | None = None,
        reading: ReaderOptions | None = None,
    ) -> list[Choice]:
        """The `params.n` choices of one prompt, numbered from `start`. Raises ApiError (400)."""
        choices, family = [], Family(params.n)
        dialect = self.service.dialect
        shown = frozenset() if reading is None else dialect.shown(reading.choice)
        for i in range(params.n):
            own = params.for_choice(i)
            try:
                text = TextStream(self.service.tokenizer, prompt, own, shown)
            except ParameterError as error:
                raise from_parameter(error, self.names) from None
            request_id = f"{self.id}-{start // params.n}-{i}"
            reader = None if reading is None else dialect.reader(reading)
            choices.append(Choice(start + i, request_id, prompt, own, text, family, reader=reader, echo=echo))
        return choices

    def extension(self, choice: Choice, update: ChoiceUpdate) -> dict[str, Any]:
        """The `dsc` object of an entry of `choices` as a dict to merge in, empty where it was not asked for.

        A reason to end that OpenAI's clients do not know is told in any case.
        """
        entry: dict[str, Any] = {}
        if self.extended or update.finish_reason != update.openai_reason:
            entry = {} if update.finish_reason is None else {"finish_reason": update.finish_reason}
        if not self.extended:
            return {"dsc": entry} if entry else {}
        routing = routing_entry(
            update.routing, choice.prompt, choice.text.kept_tokens, self.service.engine.model.capacity.picks
        )
        if routing is not None:
            entry["routing"] = routing
        if update.finish_reason is not None:
            entry["timings"] = choice.clock.timings(choice.cached_tokens)
        return {"dsc": entry} if entry else {}

    def ended(self, choice: Choice) -> None:
        """Count a choice that has ended."""
        clock = choice.clock
        self.service.metrics.generation_ended(
            *(choice.outcome, len(choice.prompt), clock.tokens, clock.mean_gap_s), adapter=self.resolved.label
        )

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
        plain = self.service.tokenizer is not None and choice.reader is None
        return plain and not reporting and not self.continuous_usage

    def text_event(self, choice: Choice, text: str) -> bytes:
        """As `events` for a text alone, of a plain choice that has begun: made once and then filled in."""
        if choice.frame is None:
            before, after = self.events(choice, ChoiceUpdate([MARK]), None).split(encode(MARK))
            choice.frame = before, after
        before, after = choice.frame
        return before + one_line(text) + after

    def last_events(self, usage: dict[str, Any]) -> bytes:
        """What ends a stream that went well."""
        return (event(self._chunk([], usage)) if self.include_usage else b"") + DONE

    def failed_events(self, error: ApiError, usage: dict[str, Any]) -> bytes:
        """What ends a stream that did not."""
        return event(error.body) + DONE

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_kind, "choices": choices}
        if self.include_usage:
            chunk["usage"] = usage
        return chunk
