"""What the endpoints share: the engine, the tokenizer, the permits and the metrics of one app."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import msgspec
from fastapi import Request

from dsc_serve.adapter_choice import AdapterChoice, AdapterInfo
from dsc_serve.config import LimitConfig
from dsc_serve.engine.tenant_report import TenantsReport
from dsc_serve.parameter_errors import ContextLengthError, ParameterError
from dsc_serve.sampling_params import EmbeddingParams, SamplingParams, resolve_max_tokens
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.server.adapters import Catalogue, ResolvedModel
from dsc_serve.server.admission import Admission, Permits, too_many
from dsc_serve.server.errors import CONTEXT_LENGTH, bad_request, from_parameter
from dsc_serve.server.extensions import AdapterFields
from dsc_serve.server.grammars import GrammarChecks
from dsc_serve.server.metrics.requests import Metrics
from dsc_serve.server.middleware import EXCHANGE, Exchange
from dsc_serve.server.tools.dialect import Dialect
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.text.chat import ChatTemplate
from dsc_serve.text.fill import fill_of
from dsc_serve.text.spelling import Spelling
from dsc_serve.text.tokenizer import Tokenizer, TokenizerError
from dsc_serve.worker.client import Family
from dsc_serve.worker.messages import Delta, GrammarChecked, ModelInfo, Stats

LONG_TEXT = 4096  # characters; about 3 ms to encode
MAX_LOW_PRIORITY = 64  # texts that wait for `Service.run_low_priority`
RENDERING = 2  # chats at a time, each in a process

T = TypeVar("T")


class EngineHandle(Protocol):
    """What the server needs of an engine; `worker.client.EngineClient` is one."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def alive(self) -> bool: ...

    @property
    def trouble(self) -> str: ...

    @property
    def gave_up(self) -> bool: ...

    @property
    def restarts(self) -> int: ...

    @property
    def in_flight(self) -> int: ...

    @property
    def heartbeat_age_s(self) -> float: ...

    def generate(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        scheduling: SchedulingParams | None = None,
        family: Family | None = None,
        embedding: EmbeddingParams | None = None,
        adapter: AdapterChoice | None = None,
    ) -> AsyncGenerator[Delta, None]: ...

    def finish(self, request_id: str, reason: str) -> None: ...

    def end_all(self, reason: str) -> None: ...

    async def stats(self, timeout_s: float = 1.0) -> Stats: ...

    async def adapters(self, timeout_s: float = 1.0) -> list[AdapterInfo]: ...

    async def tenants(self, timeout_s: float = 1.0) -> TenantsReport: ...

    async def check_grammar(self, asked: StructuredOutputs) -> GrammarChecked: ...


class Service:
    """One served model."""

    def __init__(
        self,
        engine: EngineHandle,
        tokenizer: Tokenizer | None,
        names: tuple[str, ...],
        admission: Admission,
        limits: LimitConfig,
        tool_calls: str = "auto",
        escape: bool = False,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.names = names
        self.admission = admission
        self.limits = limits
        self.catalogue = Catalogue(engine, names)
        self.metrics = Metrics(engine, admission.permits, self.catalogue)
        self.created = int(time.time())
        self.spelling = Spelling(tokenizer, escape)
        self.dialect = Dialect(tokenizer, tool_calls)
        token_bytes = 0
        self.grammars = GrammarChecks(engine, tokenizer is not None)
        self._encoding, self._aside = ThreadPoolExecutor(2, "prompts"), ThreadPoolExecutor(1, "texts")
        self._rendering = ThreadPoolExecutor(RENDERING, "templates")
        self._low_priority = 0
        if tokenizer is not None:
            token_bytes = max((len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)), default=0)
        self._max_characters = token_bytes * engine.model.capacity.max_tokens

    @property
    def permits(self) -> Permits:
        return self.admission.permits

    @property
    def chat_template(self) -> ChatTemplate | None:
        return None if self.tokenizer is None else self.tokenizer.chat_template

    @property
    def model_name(self) -> str:
        """What an answer calls the model where the client does not."""
        return self.names[0]

    async def resolve(self, request: Request, model: str | None, asked: AdapterFields | None = None) -> ResolvedModel:
        """What a request's `model` and its `dsc` object mean; it is what the log says of it. Raises ApiError (404)."""
        exchange: Exchange = request.scope[EXCHANGE]
        exchange.resolved = await self.catalogue.resolve(model, asked, exchange.key)
        return exchange.resolved

    async def encode(
        self, text: str, param: str, chat: bool = False, low_priority: bool = False, unbounded: bool = False
    ) -> list[int]:
        """Token ids of a prompt; low_priority: of one that no generation waits for; unbounded: however long it is.

        Raises ApiError, naming `param`.
        """
        if self.tokenizer is None:
            message = f"{param} is text, but this model has no tokenizer; send token ids"
            raise bad_request(param, message)
        if (
            len(text) > self._max_characters and not unbounded
        ):  # encoding it to learn that it does not fit can take seconds
            limit = self.engine.model.capacity.max_tokens
            what = param.split(".")[0]
            has = f"This model's maximum context length is {limit} tokens. However, your {what} resulted in more"
            message = f"{has}: it has {len(text)} characters. Please reduce the length of the {what}."
            raise bad_request(param, message, CONTEXT_LENGTH)
        encode = self.spelling.encode_chat if chat else self.tokenizer.encode
        try:
            if len(text) < LONG_TEXT:
                return encode(text)
            if low_priority:
                return await self.run_low_priority(lambda: encode(text))
            return await asyncio.get_running_loop().run_in_executor(self._encoding, encode, text)
        except TokenizerError as error:
            raise bad_request(param, f"{param} cannot be used: {error}") from None

    async def filled(self, prompt: str | list[int], param: str, suffix: str) -> list[int]:
        """The prompt whose continuation belongs between `prompt` and `suffix`. Raises ApiError."""
        fill = None if self.tokenizer is None else fill_of(self.tokenizer)
        if fill is None:
            what = "this model's tokenizer has no marks for filling in the middle"
            raise bad_request("suffix", f"suffix is not supported: {what}", "unsupported_parameter")
        before = await self.encode(prompt, param, chat=True) if isinstance(prompt, str) else prompt
        return fill.prompt(before, await self.encode(suffix, "suffix", chat=True))

    async def tokens(
        self, prompt: str | list[int], param: str, params: SamplingParams, truncate: int | None, chat: bool = False
    ) -> list[int]:
        """A prompt's token ids, or its last `truncate` ones (-1: as many as fit). As `encode`; chat: it is rendered."""
        if isinstance(prompt, str):
            prompt = await self.encode(prompt, param, chat, unbounded=truncate is not None)
        if truncate is None:
            return prompt
        room = self.engine.model.capacity.max_tokens - (params.max_tokens if params.max_tokens is not None else 1)
        most = max(room, 1) if truncate == -1 else truncate
        if truncate == -1 and self.limits.max_prompt_tokens:
            most = min(most, self.limits.max_prompt_tokens)
        return prompt[-most:]

    def warm(self) -> None:
        """Have ready what the first chat would wait for, in a while."""
        if self.chat_template is not None:
            self._rendering.submit(self.chat_template.warm)

    async def rendered(self, work: Callable[[], str], low_priority: bool = False) -> str:
        """What rendering a chat gives or raises; `run_low_priority` as in `encode`."""
        if low_priority:
            return await self.run_low_priority(work)
        return await asyncio.get_running_loop().run_in_executor(self._rendering, work)

    async def run_low_priority(self, work: Callable[[], T]) -> T:
        """For what no generation waits for: one at a time. Raises ApiError (429) where too much of it waits."""
        if self._low_priority >= MAX_LOW_PRIORITY:
            raise too_many("too many texts wait to be tokenised", "queue_full")
        self._low_priority += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._aside, work)
        finally:
            self._low_priority -= 1

    def admit(self, request: Request, count: int, param: str) -> None:
        """Take places for `count` generations until the request's answer ends; do so before what takes long.

        Raises ApiError; 400, naming `param`, where this server could never hold so many.
        """
        exchange: Exchange = request.scope[EXCHANGE]
        self.admission.admit(exchange.lease, count, param)

    def apply_limits(self, prompt: list[int], params: SamplingParams, names: Mapping[str, str]) -> SamplingParams:
        """The parameters with this server's bounds on what they leave open.

        Raises ApiError (400) when the engine could never hold the request, or this server allows less; `names` as in
        `from_parameter`.
        """
        limits = self.engine.model.capacity
        try:
            self._check_limits(prompt, params)
            room, most = limits.max_tokens - len(prompt), self.limits.max_output_tokens
            if params.max_tokens is None and 0 < most < room:
                params = msgspec.structs.replace(params, max_tokens=most)
            resolve_max_tokens(prompt, params, limits)
            return params
        except ParameterError as error:
            raise from_parameter(error, names) from None

    def _check_limits(self, prompt: list[int], params: SamplingParams) -> None:
        """Raises ParameterError naming the first field beyond what this server allows; 0 allows anything."""
        limits = self.limits
        size, most = len(prompt), limits.max_prompt_tokens
        if 0 < most < size:
            message = f"prompt is {size} tokens; this server allows at most {most}"
            raise ContextLengthError("prompt", message, most, size, note=f" here ({message})")
        alternatives = max(params.logprobs or 0, params.prompt_logprobs or 0)
        for field, value, most in (
            ("max_tokens", params.max_tokens or 0, limits.max_output_tokens or params.max_tokens or 0),
            ("n", params.n, limits.max_choices),
            ("logprobs", alternatives, limits.max_logprobs),
            ("stop", len(params.stop), limits.max_stops),
        ):
            if value > most:
                what = {"stop": " texts"}.get(field, "")
                raise ParameterError(field, f"{field} is {value}{what}; this server allows at most {most}")

    def token_name(self, token_id: int) -> str:
        """How log probabilities name a token."""
        return f"token_id:{token_id}" if self.tokenizer is None else self.tokenizer.token_text(token_id)
