from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.text.stream import TextStream
from dsc_serve.text.tokenizer import Tokenizer


def params(**fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=None, **fields)  # type: ignore[arg-type]


def test_text_ends_before_the_stop_and_tokens_with_it(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("The old baker. The end.")
    stream = TextStream(byte_level, byte_level.encode("Who?"), params(stop=("baker", "unseen")))
    text = "".join(stream.push([id]) for id in ids) + stream.finish()
    assert text == "The old "
    assert stream.stopped
    kept = stream.kept_tokens
    assert kept == ids[: len(kept)] and stream.token_count == len(kept)
    assert byte_level.decode(kept).startswith("The old baker")
    assert "baker" not in byte_level.decode(kept[:-1])
    assert stream.push(ids) == "" and stream.kept_tokens == kept


@given(data=st.data(), stops=st.lists(st.sampled_from([" the", "e", "ba", "😀", "你", "�", "\n"]), max_size=3))
def test_no_text_leaks_past_a_stop_however_tokens_are_grouped(
    tokenizer: Tokenizer, data: st.DataObject, stops: list[str]
) -> None:
    token = st.integers(0, tokenizer.vocab_size + 1) | st.sampled_from(tokenizer.encode("the old baker 😀 你好"))
    ids = data.draw(st.lists(token, max_size=25))
    prompt = tokenizer.encode("A")
    whole = tokenizer.decode([*prompt, *ids]).removeprefix("A")
    stream = TextStream(tokenizer, prompt, params(stop=tuple(stops)))
    text, rest = "", ids
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        text += stream.push(rest[:size])
        rest = rest[size:]
    text += stream.finish()
    assert not any(stop in text for stop in stops)
    assert stream.stopped == any(stop in whole for stop in stops)
    if stream.stopped:
        assert any(whole.startswith(text + stop) for stop in stops)
        assert stream.kept_tokens == ids[: stream.token_count]
    else:
        assert text == whole and stream.kept_tokens == ids


def test_stops_within_the_first_min_tokens_do_not_count(byte_level: Tokenizer) -> None:
    ids = [byte_level.encode("x")[0]] * 5
    stream = TextStream(byte_level, [], params(stop=("x",), min_tokens=3))
    assert "".join(stream.push([id]) for id in ids) == "xxx"
    assert stream.stopped and stream.token_count == 4
    early = TextStream(byte_level, [], params(stop=("xx",), min_tokens=1))
    assert early.push(ids[:2]) + early.finish() == "xx" and not early.stopped


def test_held_text_comes_with_finish_and_only_once(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, [], params(stop=("done!",)))
    assert stream.push(byte_level.encode("it is do")) == "it is "
    assert (stream.finish(), stream.finish()) == ("do", "")
    half = TextStream(byte_level, [], params())
    assert half.push(byte_level.encode("😀")[:1]) == ""
    assert half.finish() == "�"


def test_special_tokens_follow_the_request(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("hi<|eos|>")
    assert TextStream(byte_level, [], params()).push(ids) == "hi"
    assert TextStream(byte_level, [], params(skip_special_tokens=False)).push(ids) == "hi<|eos|>"


def test_without_a_tokenizer_tokens_are_counted_and_stops_refused() -> None:
    stream = TextStream(None, [1, 2], params())
    assert stream.push([3, 4]) == stream.finish() == ""
    assert stream.kept_tokens == [3, 4] and stream.token_count == 2 and not stream.stopped
    with pytest.raises(ParameterError, match=r"stop is \('x',\); this model has no tokenizer") as caught:
        TextStream(None, [1], params(stop=("x",)))
    assert caught.value.field == "stop"
