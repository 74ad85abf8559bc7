"""Whether a request's grammar can be used is known before the request takes a place: compiling may take seconds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from fastapi import Request
from starlette.requests import ClientDisconnect

from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.server.admission import shutting_down, too_many
from dsc_serve.server.disconnect import client_gone
from dsc_serve.server.errors import engine_down, from_parameter, out_of_time
from dsc_serve.server.middleware import EXCHANGE, Exchange
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.worker.connection import EngineDiedError
from dsc_serve.worker.messages import GrammarChecked

FIELD = "structured_outputs"
PER_KEY = 2  # grammars that one key has compiled at a time
WAITING_PER_KEY = 16  # and that wait for that
CHECK_LIMIT_S = 60.0  # for an engine that hangs


class GrammarEngine(Protocol):
    async def check_grammar(self, asked: StructuredOutputs) -> GrammarChecked: ...


class GrammarChecks:
    """Has grammars compiled, few at a time for each key, and stops where the client has left."""

    def __init__(self, engine: GrammarEngine, has_tokenizer: bool) -> None:
        self._engine, self._has_tokenizer = engine, has_tokenizer
        self._asking: Counter[str] = Counter()
        self._turns: dict[str, asyncio.Semaphore] = {}

    async def check(
        self,
        request: Request,
        params: SamplingParams,
        names: Mapping[str, str],
        timeout_s: float | None = None,
    ) -> None:
        """Raises ApiError: 400 when the grammar cannot be used (`names` as in `from_parameter`), 408 where that is not
        known within the request's own `timeout_s`, 429 where too many wait, 503 without an engine or processes for
        grammars, and where the server ends; and ClientDisconnect.
        """
        asked = params.structured_outputs
        if asked is None:
            return
        if not self._has_tokenizer:
            message = f"{FIELD} cannot be used: this model has no tokenizer"
            raise from_parameter(ParameterError(FIELD, message), names)
        exchange: Exchange = request.scope[EXCHANGE]
        name = "" if exchange.key is None else exchange.key.name
        if name and self._asking[name] >= PER_KEY + WAITING_PER_KEY:
            raise too_many(f"{self._asking[name]} grammars of this key wait to be compiled", "queue_full")
        self._asking[name] += 1
        try:
            answer = await self._unless_gone(request, name, asked, timeout_s)
        except asyncio.CancelledError:  # by the server alone, which ends: the engine knows of no such request
            raise shutting_down() from None
        finally:
            self._asking[name] -= 1
            if not self._asking[name]:
                del self._asking[name]
                self._turns.pop(name, None)
        if answer.full:
            raise too_many("too many grammars wait to be compiled", "queue_full")
        if answer.lost:
            raise engine_down(answer.error)
        if answer.error:
            calls = () if asked.calls is None else asked.calls.tools
            own = (tool.field for tool in calls if answer.error.startswith(f"{tool.field} "))
            raise from_parameter(ParameterError(next(own, FIELD), answer.error), names)

    async def _unless_gone(
        self, request: Request, name: str, asked: StructuredOutputs, timeout_s: float | None
    ) -> GrammarChecked:
        limit = CHECK_LIMIT_S if timeout_s is None else min(timeout_s, CHECK_LIMIT_S)
        checking = asyncio.create_task(self._in_turn(name, asked))
        gone = asyncio.create_task(client_gone(request.receive))
        try:
            await asyncio.wait((checking, gone), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if checking.done():
                return checking.result()
            if gone.done():
                raise ClientDisconnect
            if limit < CHECK_LIMIT_S:
                raise out_of_time(f"the grammar was not compiled within the request's timeout_s, {limit:g} s")
            raise engine_down(f"the engine has not said within {CHECK_LIMIT_S:g} s whether the grammar can be used")
        except EngineDiedError as error:
            raise engine_down(str(error)) from error
        finally:
            checking.cancel()
            gone.cancel()
            await asyncio.gather(checking, gone, return_exceptions=True)

    async def _in_turn(self, name: str, asked: StructuredOutputs) -> GrammarChecked:
        if not name:
            return await self._engine.check_grammar(asked)
        async with self._turns.setdefault(name, asyncio.Semaphore(PER_KEY)):
            return await self._engine.check_grammar(asked)
