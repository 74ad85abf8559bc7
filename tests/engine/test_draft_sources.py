"""What sources of drafts come up with, and what it costs them."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc_serve.engine.drafts.drafting import Acceptance, Drafting, DraftSource, DraftTokens
from dsc_serve.engine.drafts.ngram import CATCH_UP, REACH, NgramSource
from dsc_serve.engine.drafts.prediction import PredictionSource


def drafted(source: NgramSource, tokens: list[int], most: int = 4) -> list[int]:
    """After as many calls as it takes to read the tokens."""
    for _ in range(len(tokens) // CATCH_UP + 1):
        found, _ = source.draft(tokens, most)
    return list(found)


def longest_suffix(tokens: list[int], most: int) -> set[tuple[int, ...]]:
    """What followed the longest earlier occurrences of the last tokens, by looking everywhere."""
    end, best, found = len(tokens), 2, set()
    for place in range(1, end - 1):
        length = 0
        while length <= place and tokens[place - length] == tokens[end - 1 - length]:
            length += 1
        if length > best:
            best, found = length, set()
        if length >= best:
            periodic = list(tokens)
            for _ in range(most):
                periodic.append(periodic[-(end - 1 - place)])
            found.add(tuple(periodic[end:]))
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=0, max_size=14), st.integers(1, 5))
def test_ngram_drafts_what_followed_the_longest_matching_suffix(tokens: list[int], most: int) -> None:
    want = longest_suffix(tokens, most)
    got = drafted(NgramSource(), tokens, most)
    assert (tuple(got) in want) if want else got == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.lists(st.integers(1, 7), min_size=1, max_size=20))
def test_ngram_depends_on_the_tokens_alone(tokens: list[int], steps: list[int]) -> None:
    """Not on how many of them came between two calls."""
    source, end = NgramSource(), 0
    for step in steps:
        end = min(len(tokens), end + step)
        assert source.draft(tokens[:end], 3) == NgramSource().draft(tokens[:end], 3)


def test_ngram_forgets_what_is_out_of_reach() -> None:
    rng = random.Random(0)
    source, tokens = NgramSource(), [1, 2, 3]
    tokens += [rng.randrange(10, 10**6) for _ in range(REACH + 50)]
    assert drafted(source, [*tokens, 1, 2]) == []
    assert len(source._last) <= REACH
    assert len(source._before) <= 2 * REACH
    assert drafted(source, [*tokens, 1, 2, 1, 2])[:2] == [1, 2]


def test_ngram_takes_a_few_microseconds_a_token() -> None:
    rng = random.Random(1)
    tokens = [rng.randrange(50) for _ in range(4000)]
    best = 1e9
    for _ in range(3):
        source, growing = NgramSource(), list(tokens[:2])
        drafted(source, growing)
        began = time.process_time()
        for token in tokens[2:]:
            growing.append(token)
            source.draft(growing, 7)
        best = min(best, (time.process_time() - began) / len(tokens))
    assert best < 30e-6  # ten on an idle machine


PREDICTED = list(range(100, 160))


def right_drafts(answer: list[int], predicted: list[int], most: int = 4) -> list[bool]:
    """Whether the first draft before each token of an answer is that token."""
    source, tokens, found = PredictionSource(predicted, 2), [7, 7], []
    for token in answer:
        drafts, _ = source.draft(tokens, most)
        found.append(bool(drafts) and drafts[0] == token)
        tokens.append(token)
    return found


@pytest.mark.parametrize(
    ("name", "answer", "wrong"),
    [
        ("the same", PREDICTED, 0),
        ("a token replaced", [*PREDICTED[:20], 1, *PREDICTED[21:]], 1),
        ("three replaced", [*PREDICTED[:20], 1, 2, 3, *PREDICTED[23:]], 3),
        ("two left out", [*PREDICTED[:20], *PREDICTED[22:]], 1),
        ("three put in", [*PREDICTED[:20], 1, 2, 3, *PREDICTED[20:]], 4),
        ("four for one", [*PREDICTED[:20], 1, 2, 3, 4, *PREDICTED[21:]], 5),
        ("two differences", [*PREDICTED[:10], 1, *PREDICTED[11:30], 2, 3, *PREDICTED[30:]], 4),
        ("a beginning of its own", [1, 2, 3, *PREDICTED], 4),
    ],
)
def test_a_prediction_is_read_on_from_after_each_difference(name: str, answer: list[int], wrong: int) -> None:
    found = right_drafts(answer, PREDICTED)
    assert found.count(False) <= wrong, name
    assert all(found[-10:])


def test_nothing_is_drafted_beyond_a_predictions_end() -> None:
    source = PredictionSource([1, 2, 3], 1)
    assert list(source.draft([9, 1, 2], 5)[0]) == [3]
    assert list(source.draft([9, 1, 2, 3], 5)[0]) == []
    assert list(source.draft([9, 1, 2, 3, 4, 5], 5)[0]) == []


class Always(DraftSource):
    """Drafts one token again and again; tells what it was asked after."""

    def __init__(self, token: int, most: int = 99) -> None:
        self.token, self.most, self.asked = token, most, list[list[int]]()

    def draft(self, tokens: Sequence[int], most: int) -> tuple[list[int], int]:
        self.asked.append(list(tokens))
        return [self.token] * min(most, self.most), 0


def test_others_go_on_behind_what_must_follow() -> None:
    forced, guess = Always(1, most=2), Always(2)
    chances = {("forced", 0): Acceptance(0.9), ("guess", 0): Acceptance(0.6)}
    drafting = Drafting({"forced": forced, "guess": guess}, 5, chances, certain=["forced"])
    found = drafting.draft([7], 5)
    assert found is not None
    drafted, each = found
    assert (list(drafted.tokens), list(each)) == ([1, 1, 2, 2, 2], [0.9, 0.9, 0.6, 0.6, 0.6])
    assert guess.asked == [[7, 1, 1]]
    assert (drafted.source, drafted.leader, drafted.led) == ("guess", "forced", 2)
    alone = drafting.draft([7], 5, guess=False)
    assert alone is not None
    assert (list(alone[0].tokens), alone[0].led) == ([1, 1], 2)
    forced.most = 0
    assert drafting.draft([7], 5, guess=False) is None


@pytest.mark.parametrize(
    ("right", "computed", "shares"),
    [
        (5, 5, [("a", 2, 2), ("b", 3, 3)]),
        (3, 5, [("a", 2, 2), ("b", 1, 3)]),
        (1, 5, [("a", 1, 2), ("b", 0, 3)]),
        (2, 2, [("a", 2, 2)]),
        (0, 1, [("a", 0, 1)]),
    ],
)
def test_each_source_answers_for_its_own_drafts(right: int, computed: int, shares: list[tuple[str, int, int]]) -> None:
    drafted = DraftTokens("b", [1, 1, 2, 2, 2], 1, "a", 2)
    found = drafted.shares(right, computed)
    assert [(source, own, tried) for (source, _), own, tried in found] == shares
    assert sum(own for _, own, _ in found) == right and sum(tried for _, _, tried in found) == computed


def test_acceptance_forgets() -> None:
    acceptance = Acceptance(0.5)
    assert acceptance.chance == 0.5
    for _ in range(40):
        acceptance.observe(3, 3)
    assert acceptance.chance > 0.99
    for _ in range(40):
        acceptance.observe(0, 3)
    assert acceptance.chance < 0.05


def test_the_surest_source_drafts() -> None:
    drafting = Drafting({"a": Always(1), "b": Always(2)}, 3, {("a", 0): Acceptance(0.5), ("b", 0): Acceptance(0.6)})
    best = drafting.draft([0], 3)
    assert best is not None
    assert (best[0].source, list(best[0].tokens), list(best[1])) == ("b", [2, 2, 2], [0.6] * 3)
    for _ in range(3):
        drafting.learn(("b", 0), 0, 3)
    best = drafting.draft([0], 2)
    assert best is not None
    assert best[0].source == "a"
