"""Adds drafts to a step's plan, and learns from what became of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from dsc_serve.engine.adapter_jobs import LoadedAdapter
from dsc_serve.engine.draft_time import DraftCost
from dsc_serve.engine.drafts import SOURCES, Companion, SourceKind
from dsc_serve.engine.drafts.drafting import Acceptance, Drafting, DraftTokens, Strength
from dsc_serve.engine.drafts.patience import Patience
from dsc_serve.engine.drafts.report import DraftReport
from dsc_serve.engine.drafts.widths import Option, widths
from dsc_serve.engine.policies.base import Plan
from dsc_serve.engine.position import Further
from dsc_serve.engine.request import Request
from dsc_serve.engine.step_time import SHORTEST_MS, StepTime

REFRESH = 4, 64  # steps with drafts before one goes without, first and at last: what those take is to stay known
MOST_ADAPTERS = 256  # whose drafts are told apart, beside the model's own
PROBE = 64  # after so many steps without drafts one is tried: answers change
FEW = 4  # requests whose chances are looked at in no time
PAUSE = 4  # steps at most that pass before drafts are asked for again which could not pay

Choose = Callable[[Sequence[Option], float, float, DraftCost, int], Sequence[int]]


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
        self._refresh: dict[int, int] = {}  # by the bits of the number of streams: steps with drafts before one without
        self._refused = self._pause = 0  # times in a row that no draft could pay; steps before the next are made
        self._singles = 0  # tokens that steps draw without drafts, as long as that has been so
        self._patience = Patience()
        self.making_s = 0.0  # that the last step's drafts took to be made

    def add(self, plan: Plan, running: Mapping[str, Request], times: StepTime) -> Plan:
        """Let requests of a plan compute drafts after their tokens."""
        if self.most == 0 or not plan.tokens:
            return plan
        self._asked.clear()
        self.making_s = 0.0
        rests = self._pauses(plan.load.singles) or self._refreshes(plan.load.singles)
        drafts = {} if rests else self._drafts(plan, running, times)
        self._with, self._without = (self._with + 1, 0) if drafts else (0, self._without + 1)
        plan.drafts = drafts
        plan.load.drafted, plan.load.drafts = len(drafts), sum(len(own.tokens) for own in drafts.values())
        plan.load.masks = sum(
            max(0, len(own.tokens) - own.led)
            for request_id, own in drafts.items()
            if running[request_id].constraint is not None
        )
        return plan

    def _pauses(self, singles: int) -> bool:
        """Whether drafts were of late not worth it in such steps: with many streams to ask for them takes its time."""
        if singles != self._singles:
            self._singles, self._refused, self._pause = singles, 0, 0
        self._pause -= 1
        return self._pause >= 0

    def _refreshes(self, singles: int) -> bool:
        """Whether this step goes without: often as long as about so many streams are new, later seldom."""
        level = singles.bit_length()
        interval = self._refresh.get(level, REFRESH[0])
        if self._with < interval:
            return False
        self._refresh[level] = min(2 * interval, REFRESH[1])
        return True

    def _rest(self, refused: bool) -> None:
        """Once more no draft could pay, so the next steps go without asking; or some could."""
        self._refused = min(self._refused + 1, PAUSE) if refused else 0
        self._pause = self._refused

    def may_draft(self, request: Request) -> bool:
        """Whether a request may want drafts, which are made of all its tokens."""
        return self.most > 0 and request.params.max_drafts != 0

    def learn(self, plan: Plan, further: Mapping[str, Further]) -> None:
        """Take in what became of a step's drafts."""
        for request_id, planned in plan.drafts.items():
            found = further.get(request_id)
            if found is None or found.computed == 0:
                continue
            self.report.width.observe(found.computed)
            tried = True  # what stands behind a wrong draft says nothing
            for strength, right, computed in planned.shares(len(found.tokens), found.computed):
                self.report.count(strength[0], right, computed)
                if tried:
                    self._asked[request_id].learn(strength, right, computed)
                tried = tried and right == computed

    def _drafts(self, plan: Plan, running: Mapping[str, Request], times: StepTime) -> dict[str, DraftTokens]:
        estimate, load = times.estimate, plan.load
        room = self._step_tokens - sum(plan.tokens.values())
        if room <= 0 or estimate is None:
            return {}
        step_ms, cost = times.without_drafts(load) or SHORTEST_MS, times.drafts.cost(estimate.single)
        drawn = max(load.singles, 1)
        able = [
            (request, request.drafting or self._begin(request))
            for request_id, count in plan.tokens.items()
            if count == 1 and (request := running.get(request_id)) is not None
        ]
        # no draft that is less likely right can pay, with as many others as there may be
        least = (cost.token + cost.request / max(self.most, 1)) * drawn / step_ms
        hopeful = [(request, drafting) for request, drafting in able if drafting.chance > least]
        if not hopeful:
            self._rest(len(able) > FEW)
            return self._probe(able) if self._without >= PROBE else {}
        if len(plan.tokens) == 1:  # with company nobody waits before a step
            for request, _ in hopeful:
                if request.constraint is not None:
                    self.making_s += self._patience.wait(request.constraint, step_ms)
        made = {request.id: self._offer(request, drafting) for request, drafting in hopeful}
        for name, kind in self._kinds.items():
            if kind.together is not None:
                behind = [pair for pair in hopeful if self._is_behind(made[pair[0].id], name, pair[1])]
                self._make(name, kind.together, behind, drawn, step_ms, cost, room)
                made |= {request.id: self._offer(request, drafting) for request, drafting in behind}
        offers = [(one[0], offer) for one in hopeful if (offer := made[one[0].id]) is not None]
        if not offers:
            return {}
        mask_ms = times.drafts.mask_ms
        options = [
            Option(chances, 0.0 if request.constraint is None else mask_ms, drafted.led)
            for request, (drafted, chances) in offers
        ]
        chosen = self._choose(options, drawn, step_ms, cost, room)
        self._rest(not any(chosen))
        if not any(chosen) and self._without >= PROBE:
            return self._probe(able)
        return self._planned([(request, drafted) for request, (drafted, _) in offers], chosen)

    def _begin(self, request: Request) -> Drafting:
        """The sources of a new request."""
        params = request.params
        most = self.most if params.max_drafts is None else min(self.most, params.max_drafts)
        made = {name: kind.make(request) for name, kind in (self._kinds if most else {}).items()}
        sources = {name: source for name, source in made.items() if source is not None}
        certain = [name for name, kind in self._kinds.items() if kind.certain]
        request.drafting = Drafting(sources, most, self._seen_with(request.adapter), certain)
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
        if offer is None and request is not None and drafting is not None and self._most(request, drafting) > 0:
            for name, kind in self._kinds.items():
                if kind.together is not None and name in drafting.sources:
                    kind.together.draft([(request, 1)])
                    self.making_s += kind.together.spent_s
            offer = self._offer(request, drafting)
        if request is None or offer is None:
            return {}
        return self._planned([(request, offer[0])], [1])

    def _offer(self, request: Request, drafting: Drafting) -> tuple[DraftTokens, Sequence[float]] | None:
        """A request's drafts as far as they may count: none ends it, and the token after them has room."""
        params, most = request.params, self._most(request, drafting)
        guess = request.constraint is None or request.constraint.foresees
        offer = drafting.draft(request.tokens, most, guess) if most > 0 else None
        if offer is None:
            return None
        drafted, chances = offer
        for i, token in enumerate(drafted.tokens):
            if (token in self._ends and not params.ignore_eos) or token in params.stop_token_ids:
                return (replace(drafted, tokens=drafted.tokens[:i]), chances[:i]) if i else None
        return offer

    def _most(self, request: Request, drafting: Drafting) -> int:
        """Drafts that a request may have in a step."""
        if request.output_size == 0 or request.num_uncomputed != 1:
            return 0
        return min(drafting.most, request.max_tokens - request.output_size - 1)

    def _is_behind(self, offer: tuple[DraftTokens, Sequence[float]] | None, name: str, drafting: Drafting) -> bool:
        """Whether a source that others have to make drafts for would likely know better."""
        if name not in drafting.sources:
            return False
        return offer is None or offer[1][-1] < drafting.chance_of((name, 0))

    def _make(
        self,
        name: str,
        companion: Companion,
        wanting: Sequence[tuple[Request, Drafting]],
        drawn: float,
        step_ms: float,
        cost: DraftCost,
        room: int,
    ) -> None:
        """Have drafts made, as many of each request as are expected to pay."""
        options = [
            Option([drafting.chance_of((name, 0))] * max(0, self._most(request, drafting)), companion.ms)
            for request, drafting in wanting
        ]
        chosen = self._choose([option for option in options if option.most], drawn, step_ms, cost, room)
        able = [request for (request, _), option in zip(wanting, options, strict=True) if option.most]
        asked = [(request, width) for request, width in zip(able, chosen, strict=True) if width]
        if asked:
            companion.draft(asked)
            self.making_s += companion.spent_s

    def _planned(self, offers: Sequence[tuple[Request, DraftTokens]], chosen: Sequence[int]) -> dict[str, DraftTokens]:
        planned = {}
        for (request, drafted), width in zip(offers, chosen, strict=True):
            if width and request.drafting is not None:
                planned[request.id] = replace(drafted, tokens=drafted.tokens[:width])
                self._asked[request.id] = request.drafting
        return planned
