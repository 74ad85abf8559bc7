from __future__ import annotations

import time

from hypothesis import example, given
from hypothesis import strategies as st

from dsc_serve.text.stop import StopMatcher

# Few letters, so that stops overlap each other and themselves.
WORD = st.text("abc", min_size=1, max_size=5)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Start and text of the stop that completes first, the longest of equals; by trying every end."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return end - len(stop), stop
    return None


@given(chunks=st.lists(st.text("abc", max_size=4), max_size=12), stops=st.lists(WORD, max_size=4))
@example(chunks=["aa", "ab"], stops=["aab"])
@example(chunks=["abc", "d"], stops=["abcd", "bc"])
def test_stops_are_found_across_any_chunk_boundaries(chunks: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    released = ""
    text = ""
    for chunk in chunks:
        released += matcher.push(chunk)
        text += chunk
        found = first_stop(text, stops)
        if found is not None:
            assert (released, matcher.found) == (text[: found[0]], found[1])
        else:
            assert matcher.found is None
            held = text.removeprefix(released)
            assert text == released + held
            assert not held or any(stop.startswith(held) for stop in stops)
    rest = matcher.flush()
    assert rest == "" if matcher.found else released + rest == text


def test_nothing_is_held_without_reason() -> None:
    matcher = StopMatcher(("STOP",))
    assert matcher.push("hello") == "hello"
    assert matcher.push(" S") == " "
    assert matcher.push("T") == ""
    assert matcher.push("ART S") == "START "
    assert matcher.flush() == "S"
    assert matcher.flush() == ""
    assert StopMatcher(()).push("anything") == "anything"


def test_nothing_comes_out_after_a_stop() -> None:
    matcher = StopMatcher(("\n\n",))
    assert matcher.push("one\n\ntwo") == "one"
    assert matcher.found == "\n\n"
    assert matcher.push("three") == ""
    assert matcher.flush() == ""


def test_long_stops_that_nearly_match_cost_linear_time() -> None:
    stop = "a" * 20_000 + "b"
    start = time.process_time()
    matcher = StopMatcher((stop,))
    released = "".join(matcher.push("a" * 4) for _ in range(20_000))
    assert time.process_time() - start < 5
    assert released + matcher.flush() == "a" * 80_000
