"""Which model a request means: the base, one of the adapters that the engine knows, or several with weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from dsc_serve.adapter_choice import AdapterChoice, AdapterInfo, Form
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.server.errors import ApiError, bad_request, engine_down, shown, without_paths
from dsc_serve.server.extensions import AdapterFields
from dsc_serve.server.keys import Key
from dsc_serve.worker.client import EngineDiedError

LOOK_S = 1.0  # how old a list may be
MOST_NAMED = 8  # in an error
COMPOSITION = "(composition)"  # of several, as metrics and logs call it
FORMS: dict[str, Form] = {"sum": "sum", "product_of_sums": "product of sums"}
NOT_FOUND, BROKEN = "model_not_found", "adapter_broken"


class AdapterEngine(Protocol):
    """What knows the adapters."""

    async def adapters(self, timeout_s: float = 1.0) -> list[AdapterInfo]: ...


@dataclass(frozen=True)
class ResolvedModel:
    """What a request's `model` and `dsc.adapters` mean."""

    name: str  # what its answer calls it
    choice: AdapterChoice | None = None  # None: the base alone

    @property
    def label(self) -> str:
        """Of metrics and logs, "" of the base."""
        if self.choice is None:
            return ""
        return self.choice.names[0] if self.choice.single else COMPOSITION


@dataclass
class Catalogue:
    """The adapters by name, as the engine listed them at most LOOK_S ago; while it does not answer, as it last did."""

    engine: AdapterEngine
    bases: tuple[str, ...]  # the names of the base model, of which no adapter can take one
    known: Mapping[str, AdapterInfo] = field(default_factory=dict)
    _looked: float = float("-inf")
    _answered: bool = False  # the engine, ever
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def look(self) -> Mapping[str, AdapterInfo]:
        """The adapters now."""
        async with self._looking:  # who comes while somebody asks waits for the answer
            if time.monotonic() - self._looked >= LOOK_S:
                self._looked = time.monotonic()
                with suppress(TimeoutError, EngineDiedError, ConnectionError):
                    self.known = {info.name: info for info in await self.engine.adapters(LOOK_S)}
                    self._answered = True
        return self.known

    async def visible(self, key: Key | None) -> list[AdapterInfo]:
        """Those that whoever has this key may know of, by name."""
        known = await self.look()
        return [info for name, info in sorted(known.items()) if allowed(key, name)]

    def shows_base(self, key: Key | None) -> bool:
        """Whether whoever has this key may use the base alone."""
        return key is None or key.adapters is None or any(name in key.adapters for name in self.bases)

    async def resolve(self, model: str | None, asked: AdapterFields | None, key: Key | None) -> ResolvedModel:
        """What is meant. Raises ApiError: 404 for a name that is not known, not this key's, or of a broken adapter."""
        if asked is not None and asked.adapters is not None:
            return await self._composed(model, asked, key)
        if asked is not None and asked.composition is not None:
            message = "dsc.composition is set; it may only be with dsc.adapters"
            raise bad_request("dsc.composition", message)
        if model is None and not self.shows_base(key):
            assert key is not None and key.adapters is not None
            model = next(iter(key.adapters), None)
        if model is None or (model in self.bases and self.shows_base(key)):
            return ResolvedModel(model or self.bases[0])
        return ResolvedModel(model, AdapterChoice.of(await self._usable(model, "model", key)))

    def adapter_of(self, model: str) -> str:
        """The adapter that NAME or BASE:NAME names."""
        prefix = next((f"{base}:" for base in self.bases if model.startswith(f"{base}:")), "")
        return model.removeprefix(prefix)

    async def _composed(self, model: str | None, asked: AdapterFields, key: Key | None) -> ResolvedModel:
        assert asked.adapters is not None
        if model is not None and model not in self.bases:
            message = f"dsc.adapters is set together with model {shown(model)}, which must be the base's or left out"
            raise bad_request("dsc.adapters", message)
        form = FORMS[asked.composition or "sum"]
        try:
            choice = AdapterChoice(tuple(asked.adapters.items()), form)
        except ParameterError as error:
            raise bad_request("dsc.adapters", str(error).replace(error.field, "dsc.adapters", 1)) from None
        for name in choice.names:
            await self._usable(name, "dsc.adapters", key)
        if choice.single:
            return ResolvedModel(choice.names[0], choice)
        return ResolvedModel("+".join(f"{weight:g}*{name}" for name, weight in choice.parts), choice)

    async def find(self, written: str, param: str, key: Key | None) -> AdapterInfo:
        """The adapter that a client has written so.

        Raises ApiError: 404 where this key has none of the name, 503 where nobody could ever say.
        """
        name = self.adapter_of(written)
        info = self.known.get(name)
        if info is None or info.error:
            info = (await self.look()).get(name)
        if info is None and not self._answered:
            raise engine_down("the engine has not told yet which adapters there are")
        if info is None or not allowed(key, name):
            raise unknown(param, written, await self._names(key))
        return info

    async def _usable(self, written: str, param: str, key: Key | None) -> str:
        """The name of an adapter that is not broken, either. Raises ApiError (404)."""
        info = await self.find(written, param, key)
        if info.error:
            raise broken(param, info.name, info.error)
        return info.name

    async def _names(self, key: Key | None) -> list[str]:
        own = list(self.bases) if self.shows_base(key) else []
        return own + [info.name for info in await self.visible(key)]


def allowed(key: Key | None, name: str) -> bool:
    return key is None or key.adapters is None or name in key.adapters


def unknown(param: str, written: str, names: Sequence[str]) -> ApiError:
    some = ", ".join(map(shown, names[:MOST_NAMED])) or "none"
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    message = f"model {shown(written)} is not served here; this server has {some}{more}"
    return ApiError(404, message, param=param, code=NOT_FOUND)


def refused_by_engine(resolved: ResolvedModel, error: str, unknown: bool) -> ApiError:
    """What the engine says of adapters that were there when the request came, or that cannot be composed so.

    unknown: one of them has gone meanwhile.
    """
    if resolved.choice is not None and not resolved.choice.single:
        return bad_request("dsc.adapters", f"dsc.adapters cannot be used: {without_paths(error)}")
    return ApiError(404, without_paths(error), param="model", code=NOT_FOUND if unknown else BROKEN)


def broken(param: str, name: str, reason: str) -> ApiError:
    message = f"adapter {shown(name)} cannot be used: {reason}"
    return ApiError(404, message, param=param, code=BROKEN)
