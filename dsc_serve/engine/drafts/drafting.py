"""Where one request's drafts come from, and how often they have proved right."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

FORGET = 0.9  # weight of an observation that is one step older than another
PRIOR = 2.0  # trials that what is expected of a new request's drafts counts for

PREDICTION = "prediction"  # the source whose drafts are told to clients
COMPANION = "model"  # the source that only engines with a smaller model have

Strength = tuple[str, int]  # the source's name, and how sure it was


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """What may follow a request's tokens."""

    source: str  # its name
    tokens: Sequence[int]
    strength: int = 0  # how sure the source is, in steps of its own
    leader: str = ""  # the source that the first of them come from, if another one
    led: int = 0  # how many of the first tokens must follow, and come from `leader`

    def shares(self, right: int, computed: int) -> list[tuple[Strength, int, int]]:
        """Of so many drafts that proved right, and that were computed, those of each source."""
        led = min(self.led, computed)
        parts = [((self.leader, 0), min(right, led), led), ((self.source, self.strength), right - led, computed - led)]
        return [(source, max(0, own), tried) for source, own, tried in parts if tried]


class DraftSource(Protocol):
    """Drafts for one request: a pure function of its tokens and of what the source has kept of them."""

    def draft(self, tokens: Sequence[int], most: int) -> tuple[Sequence[int], int]:
        """At most so many tokens that may follow these, which have grown since the last call, and the strength."""
        ...

    def close(self) -> None:
        """The request has ended. Safe to call twice."""
        return


class Acceptance:
    """How often a draft was right where all before it were: a decayed average that begins with what is expected."""

    __slots__ = ("_right", "_trials")

    def __init__(self, expected: float) -> None:
        self._right, self._trials = PRIOR * expected, PRIOR

    @property
    def chance(self) -> float:
        return self._right / self._trials

    def observe(self, right: int, computed: int) -> None:
        """So many drafts of those computed proved right; what stood behind the first wrong one says nothing."""
        self._right = FORGET * self._right + right
        self._trials = FORGET * self._trials + min(right + 1, computed)


class Drafting:
    """The sources of one request, best first where nothing is known, and what became of their drafts.

    most: drafts that a step may compute. expected: the chance of a source's drafts before any was tried. certain: the
    sources whose drafts must follow, so that the others' come after them.
    """

    def __init__(
        self,
        sources: dict[str, DraftSource],
        most: int,
        seen: Mapping[Strength, Acceptance],
        certain: Collection[str] = (),
    ) -> None:
        """seen: what became of such requests' drafts so far, which learns from this one's too."""
        self.sources, self.most, self._seen = sources, most, seen
        self._expected = {strength: own.chance for strength, own in seen.items()}
        self._certain = [name for name in sources if name in certain]
        self._guessing = [name for name in sources if name not in certain]
        self._acceptances: dict[Strength, Acceptance] = {}
        self.chance = self._best_chance()  # of the best that it may come up with

    def chance_of(self, strength: Strength) -> float:
        acceptance = self._acceptances.get(strength)
        return self._expected[strength] if acceptance is None else acceptance.chance

    def draft(self, tokens: Sequence[int], most: int, guess: bool = True) -> tuple[DraftTokens, Sequence[float]] | None:
        """The drafts that most likely prove right, each with its chance where all before it are; None where there are
        none. guess: whether they may be such as need not follow.
        """
        led = self._best(self._certain, tokens, most)
        if led is None:
            best = self._best(self._guessing, tokens, most) if guess else None
            return None if best is None else (best[0], [best[1]] * len(best[0].tokens))
        first, sure = led
        count = len(first.tokens)
        best = self._best(self._guessing, [*tokens, *first.tokens], most - count) if guess and count < most else None
        if best is None:
            return replace(first, leader=first.source, led=count), [sure] * count
        then, chance = best
        drafted = DraftTokens(then.source, [*first.tokens, *then.tokens], then.strength, first.source, count)
        return drafted, [sure] * count + [chance] * len(then.tokens)

    def close(self) -> None:
        """The request has ended. Safe to call twice."""
        for source in self.sources.values():
            source.close()

    def learn(self, strength: Strength, right: int, computed: int) -> None:
        self._seen[strength].observe(right, computed)
        if strength not in self._acceptances:
            self._acceptances[strength] = Acceptance(self._expected[strength])
        self._acceptances[strength].observe(right, computed)
        self.chance = self._best_chance()

    def _best(self, names: Sequence[str], tokens: Sequence[int], most: int) -> tuple[DraftTokens, float] | None:
        best: tuple[DraftTokens, float] | None = None
        for name in names:
            drafted, strength = self.sources[name].draft(tokens, most)
            if drafted:
                chance = self.chance_of((name, strength))
                if best is None or chance > best[1]:
                    best = DraftTokens(name, drafted, strength), chance
        return best

    def _best_chance(self) -> float:
        chances = [self.chance_of(strength) for strength in self._expected if strength[0] in self.sources]
        return max(chances, default=0.0)
