"""Adds drafts to a step's plan, and learns from what became of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from dsc_serve.engine.adapter_jobs import LoadedAdapter
from dsc_serve.engine.draft_time import DraftCost
from dsc_serve.engine.drafts import SOURCES, SourceKind
from dsc_serve.engine.drafts.drafting import Acceptance, Drafting, DraftTokens, Strength
from dsc_serve.engine.drafts.report import DraftReport
from dsc_serve.engine.drafts.widths import widths
from dsc_serve.engine.policies.base import Plan
from dsc_serve.engine.position import Further
from dsc_serve.engine.request import Request
from dsc_serve.engine.step_time import SHORTEST_MS, StepTime

REFRESH = 64  # of so many steps with drafts one goes without, so that what steps take without stays known
MOST_ADAPTERS = 256  # whose drafts are told apart, beside the model's own
PROBE = 64  # after so many steps without drafts one is tried: answers change

Choose = Callable[[Sequence[tuple[float, int]], float, float, DraftCost, int], Sequence[int]]


class Drafter:
    """Drafts for requests that compute their last token in a step, where they are expected to pay.

    most: drafts of one request in a step; 0: there are none, and nothing is kept for them. step_tokens: that a step may
    hold; drafts take what all requests' tokens leave. ends: tokens that end a text.
    """

    def __init__(
        self,
        most: int,
        step_tokens: int,
        ends: Collection[int],
        kinds: Mapping[str, SourceKind] = SOURCES,
        choose: Choose = widths,
    ) -> None:
        self.most, self.report = most, DraftReport.of(kinds)
        self._step_tokens, self._ends, self._kinds, self._choose = step_tokens, frozenset(ends), kinds, choose
        self._seen: OrderedDict[str, dict[Strength, Acceptance]] = OrderedDict()  # by adapter, the latest last
        self._asked: dict[str, Drafting] = {}
        self._with = self._without = 0  # steps in a row
        self._turn = 0

    def add(self, plan: Plan, running: Mapping[str, Request], times: StepTime) -> Plan:
        """Let requests of a plan compute drafts after their tokens."""
        if self.most == 0 or not plan.tokens:
            return plan
        self._asked.clear()
        drafts = {} if self._with >= REFRESH else self._drafts(plan, running, times)
        self._with, self._without = (self._with + 1, 0) if drafts else (0, self._without + 1)
        plan.drafts = drafts
        plan.load.drafted, plan.load.drafts = len(drafts), sum(len(own.tokens) for own in drafts.values())
        return plan

    def learn(self, plan: Plan, further: Mapping[str, Further]) -> None:
        """Take in what became of a step's drafts."""
        for request_id, planned in plan.drafts.items():
            found = further.get(request_id)
            if found is None or found.computed == 0:
                continue
            strength, right = (planned.source, planned.strength), len(found.tokens)
            self._asked[request_id].learn(strength, right, found.computed)
            self.report.count(planned.source, right, found.computed)

    def _drafts(self, plan: Plan, running: Mapping[str, Request], times: StepTime) -> dict[str, DraftTokens]:
        estimate, load = times.estimate, plan.load
        room = self._step_tokens - sum(plan.tokens.values())
        if room <= 0 or estimate is None:
            return {}
        step_ms, cost = max(estimate.ms(load), SHORTEST_MS), times.drafts.cost(estimate.single)
        drawn = max(load.singles, 1)
        able = [
            (request, request.drafting or self._begin(request))
            for request_id, count in plan.tokens.items()
            if count == 1 and (request := running.get(request_id)) is not None
        ]
        least = cost.token * drawn / step_ms  # no draft that is less likely right can pay
        hopeful = [(request, drafting) for request, drafting in able if drafting.chance > least]
        if not hopeful and self._without >= PROBE:
            return self._probe(able)
        offers = [(one[0], offer) for one in hopeful if (offer := self._offer(*one)) is not None]
        if not offers:
            return {}
        options = [(chance, len(drafted.tokens)) for _, (drafted, chance) in offers]
        chosen = self._choose(options, drawn, step_ms, cost, room)
        if not any(chosen) and self._without >= PROBE:
            return self._probe(able)
        return self._planned([(request, drafted) for request, (drafted, _) in offers], chosen)

    def _begin(self, request: Request) -> Drafting:
        """The sources of a new request. One that follows a grammar has those that know what may follow each draft."""
        params, free = request.params, request.constraint is None
        most = self.most if params.max_drafts is None else min(self.most, params.max_drafts)
        kinds = self._kinds if most else {}
        made = {name: kind.make(request) for name, kind in kinds.items() if free or kind.with_grammar}
        sources = {name: source for name, source in made.items() if source is not None}
        request.drafting = Drafting(sources, most, self._seen_with(request.adapter))
        return request.drafting

    def _seen_with(self, adapter: LoadedAdapter | None) -> dict[Strength, Acceptance]:
        """What became of drafts of requests with this adapter, which writes in its own way, or with none."""
        digest = "" if adapter is None else adapter.digest
        if digest not in self._seen:
            self._seen[digest] = {
                (name, strength): Acceptance(chance)
                for name, kind in self._kinds.items()
                for strength, chance in enumerate(kind.chances)
            }
            if len(self._seen) > MOST_ADAPTERS:
                del self._seen[next(digest for digest in self._seen if digest)]
        self._seen.move_to_end(digest)
        return self._seen[digest]

    def _probe(self, able: Sequence[tuple[Request, Drafting]]) -> dict[str, DraftTokens]:
        """One draft of one request, each in its turn, though it is not expected to pay."""
        self._turn += 1
        request, drafting = able[self._turn % len(able)] if able else (None, None)
        offer = None if request is None or drafting is None else self._offer(request, drafting)
        if request is None or offer is None:
            return {}
        return self._planned([(request, offer[0])], [1])

    def _offer(self, request: Request, drafting: Drafting) -> tuple[DraftTokens, float] | None:
        """A request's drafts as far as they may count: none ends it, and the token after them has room."""
        params = request.params
        if request.output_size == 0 or request.num_uncomputed != 1:
            return None
        most = min(drafting.most, request.max_tokens - request.output_size - 1)
        offer = drafting.draft(request.tokens, most) if most > 0 else None
        if offer is None:
            return None
        drafted, chance = offer
        tokens = drafted.tokens
        for i, token in enumerate(tokens):
            if (token in self._ends and not params.ignore_eos) or token in params.stop_token_ids:
                return (replace(drafted, tokens=tokens[:i]), chance) if i else None
        return drafted, chance

    def _planned(self, offers: Sequence[tuple[Request, DraftTokens]], chosen: Sequence[int]) -> dict[str, DraftTokens]:
        planned = {}
        for (request, drafted), width in zip(offers, chosen, strict=True):
            if width and request.drafting is not None:
                planned[request.id] = replace(drafted, tokens=drafted.tokens[:width])
                self._asked[request.id] = request.drafting
        return planned
