"""Drafts of a smaller model with the same tokenizer, for all requests of a step at once."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from dsc_serve.engine.drafts import SourceKind
from dsc_serve.engine.drafts.drafting import COMPANION, DraftSource
from dsc_serve.engine.isolation import StepRunner, is_out_of_memory
from dsc_serve.engine.kv_cache import BlockPool
from dsc_serve.engine.request import NO_BLOCKS, Request
from dsc_serve.kv_layout import blocks_for
from dsc_serve.sampling_params import SamplingParams

log = logging.getLogger(__name__)

CHANCE = 0.6  # that a draft is right, before any was tried
CATCH_UP = 256  # tokens that are read before a step's drafts, at most: others wait meanwhile
FORGET = 0.9  # weight of what a draft took that is one call older than another
EXPECTED_MS = 1.0  # that a draft takes, before any has been made


class CompanionSource(DraftSource):
    """What the smaller model knows of one request: its tokens in a sequence of that model's own.

    shadow: that sequence; its blocks are the smaller model's. agreed: how many of its tokens are known to be the
    request's. Where drafts prove wrong, it is read on from behind the last token that was right.
    """

    def __init__(self, drafter: DraftModel, request: Request) -> None:
        self._drafter = drafter
        self.shadow = Request(request.id, request.prompt_size, [], shadow_params(request), 1)
        self.shadow.seed = request.seed  # so that it draws what the request would of the same logits
        self.agreed = 0
        self._base = 0  # tokens of the request that the drafts follow
        self._drafts: list[int] = []

    def draft(self, tokens: Sequence[int], most: int) -> tuple[Sequence[int], int]:
        ahead = len(tokens) - self._base
        if ahead < 0 or self._drafts[:ahead] != list(tokens[self._base :]):
            return (), 0
        return self._drafts[ahead : ahead + most], 0

    def close(self) -> None:
        self._drafter.release(self)

    def follow(self, tokens: Sequence[int]) -> None:
        """Let the shadow be these, which have grown since the last call, with what of it has been computed."""
        own = self.shadow.tokens
        same = self.agreed
        while same < min(len(own), len(tokens)) and own[same] == tokens[same]:
            same += 1
        own[same:] = tokens[same:]
        self.agreed = len(tokens)
        self.shadow.num_computed = min(self.shadow.num_computed, same, len(own) - 1)

    def take(self, base: int) -> None:
        """What the shadow has beyond the request's tokens are its drafts."""
        self._base, self._drafts = base, self.shadow.tokens[base:]


def shadow_params(request: Request) -> SamplingParams:
    """How drafts are drawn: as the request's tokens are, but for what hangs on the text so far."""
    p = request.params
    return SamplingParams(
        temperature=p.temperature, top_p=p.top_p, top_k=p.top_k, min_p=p.min_p, logit_bias=p.logit_bias, max_tokens=1
    )


class DraftModel:
    """A smaller model's runner and KV blocks, and the sequences that they hold.

    Where blocks run out, those go that were used the longest ago: their requests are read anew. context: most tokens of
    a sequence. groups: of layers, each of which has blocks of its own for all tokens, whatever its layers see. ms:
    milliseconds that a draft takes to make; spent_s: seconds of the last call.
    """

    def __init__(
        self, runner: StepRunner, blocks: int, block_size: int, step_tokens: int, context: int, groups: int = 1
    ) -> None:
        self.groups = groups
        self.pool, self.ms, self.spent_s = BlockPool(blocks), EXPECTED_MS, 0.0
        self._runner, self._block_size, self._context = runner, block_size, context
        self._step_tokens = step_tokens
        self._held: OrderedDict[int, CompanionSource] = OrderedDict()
        self._failed = False  # which is told once

    def kind(self) -> SourceKind:
        """As the registry of sources knows it."""
        return SourceKind(lambda request: CompanionSource(self, request), (CHANCE,), together=self)

    def draft(self, asked: Sequence[tuple[Request, int]]) -> None:
        """Draft for each of these requests, at most so many tokens; its source then has them.

        Where the smaller model fails nobody has any, and all sequences are read anew: drafts are nobody's right. What a
        device is broken by is told.
        """
        began = time.perf_counter()
        try:
            self._draft(asked)
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise
            if not is_out_of_memory(error) and not self._failed:
                log.exception("the draft model failed; its drafts are left out where it does")
                self._failed = True
            for source in list(self._held.values()):
                self.release(source)
        self.spent_s = time.perf_counter() - began

    def _draft(self, asked: Sequence[tuple[Request, int]]) -> None:
        ready, reading = self._ready(asked)
        drafting = self._read(reading + ready) if reading else ready
        drafted, started = 0, time.perf_counter()
        most_drafts = max((most for _, most in drafting), default=0)
        for i in range(most_drafts):
            going = [source for source, most in drafting if i < most]
            if i or not reading:
                self._advance([(source, 1) for source in going])
                drafted += len(going)
        for source, _ in drafting:
            source.take(source.agreed)
        if drafted:
            self.ms += (1 - FORGET) * (1e3 * (time.perf_counter() - started) / drafted - self.ms)

    def release(self, source: CompanionSource) -> None:
        """Nobody wants its drafts any more, or others need its blocks. Safe to call twice."""
        self._held.pop(id(source), None)
        shadow = source.shadow
        self.pool.release(shadow.blocks)
        shadow.rows, shadow.table, shadow.num_computed = [[]], NO_BLOCKS, 0

    def _ready(
        self, asked: Sequence[tuple[Request, int]]
    ) -> tuple[list[tuple[CompanionSource, int]], list[tuple[CompanionSource, int]]]:
        """The sources that have blocks, with their numbers: those with one token to compute, and those with more."""
        ready: list[tuple[CompanionSource, int]] = []
        reading: list[tuple[CompanionSource, int]] = []
        wanted = {id(source) for request, _ in asked if (source := source_of(request)) is not None}
        for request, most in asked:
            source = source_of(request)
            if source is None or request.num_tokens + most > self._context:
                continue
            source.follow(request.tokens)
            if self._allocate(source, request.num_tokens + most - 1, wanted):
                (ready if source.shadow.num_uncomputed == 1 else reading).append((source, most))
        return ready, reading

    def _read(self, reading: Sequence[tuple[CompanionSource, int]]) -> list[tuple[CompanionSource, int]]:
        """Compute what these have not computed yet, CATCH_UP tokens at most; returns those with a first draft."""
        room, work = min(CATCH_UP, self._step_tokens), []
        for source, _ in sorted(reading, key=lambda pair: pair[0].shadow.num_uncomputed):
            count = min(source.shadow.num_uncomputed, room)
            if count:
                work.append((source, count))
                room -= count
        self._advance(work)
        return [pair for pair in reading if len(pair[0].shadow.tokens) > pair[0].agreed]

    def _advance(self, work: Sequence[tuple[CompanionSource, int]]) -> None:
        """Compute so many tokens of each, and draw one where these are all."""
        if not work:
            return
        found = self._runner.run([(source.shadow, count) for source, count in work])
        for source, count in work:
            shadow = source.shadow
            shadow.num_computed += count
            token = found.tokens.get(shadow.id)
            if token is not None:
                shadow.tokens.append(token)

    def _allocate(self, source: CompanionSource, tokens: int, wanted: set[int]) -> bool:
        """Let a source hold so many tokens, if the sources that are not wanted now leave the blocks."""
        shadow = source.shadow
        missing = self.groups * max(0, blocks_for(tokens, self._block_size) - shadow.pages)
        while missing > self.pool.available:
            other = next((held for key, held in self._held.items() if key not in wanted), None)
            if other is None:
                return False
            self.release(other)
        self._held[id(source)] = source
        self._held.move_to_end(id(source))
        if missing > 0:
            if not shadow.pages:
                shadow.rows, shadow.gone = [[] for _ in range(self.groups)], [0] * self.groups
            blocks, each = self.pool.allocate(missing), missing // self.groups
            for group, row in enumerate(shadow.rows):
                row.extend(blocks[group * each : (group + 1) * each])
            shadow.table = np.array(shadow.rows)
        return True


def source_of(request: Request) -> CompanionSource | None:
    """A request's source of this kind."""
    source = None if request.drafting is None else request.drafting.sources.get(COMPANION)
    return source if isinstance(source, CompanionSource) else None
