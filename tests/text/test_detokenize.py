from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc_serve.text.detokenize import IncrementalDetokenizer
from dsc_serve.text.tokenizer import Tokenizer


def pieces(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool = True) -> list[str]:
    """What each token releases, and last what is flushed."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push([id]) for id in ids), detokenizer.flush()]


@given(data=st.data(), skip=st.booleans())
def test_any_tokens_in_any_chunks_continue_the_prompt_as_decoding_does(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    token = st.integers(-1, tokenizer.vocab_size + 2) | st.sampled_from(tokenizer.encode("😀 你好 é the"))
    prompt, ids = data.draw(st.lists(token, max_size=12)), data.draw(st.lists(token, max_size=30))
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6))), len(ids)]
    text = "".join(detokenizer.push(ids[start:end]) for start, end in itertools.pairwise(cuts))
    text += detokenizer.flush()
    whole, before = tokenizer.decode([*prompt, *ids], skip), tokenizer.decode(prompt, skip)
    if before.endswith("�"):  # within a character, which then belongs to the generated text
        assert whole.endswith(text)
        assert before.startswith(whole.removesuffix(text))
    else:
        assert before + text == whole


@given(data=st.data())
def test_released_text_is_never_taken_back(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    more = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=6))
    assert tokenizer.decode(ids + more).startswith("".join(pieces(tokenizer, [], ids)[:-1]))


@pytest.mark.parametrize("text", ["😀", "你好世界", "👩‍🚀", "naïve café", "한국어"])
def test_characters_spread_over_tokens_are_released_whole(tokenizer: Tokenizer, text: str) -> None:
    prompt = tokenizer.encode("The")
    ids = tokenizer.encode(text, add_special_tokens=False)
    released = pieces(tokenizer, prompt, ids)
    assert "".join(released).lstrip() == text
    assert not any("�" in piece for piece in released)
    assert released[-1] == ""


def test_the_space_between_prompt_and_answer_is_kept(metaspace: Tokenizer) -> None:
    prompt, ids = metaspace.encode("The"), metaspace.encode("quick brown")
    assert metaspace.decode(ids) == "quick brown"
    assert "".join(pieces(metaspace, prompt, ids)) == " quick brown"
    assert metaspace.bos_token_id is not None
    assert "".join(pieces(metaspace, [metaspace.bos_token_id], ids)) == "quick brown"
    assert "".join(pieces(metaspace, [metaspace.bos_token_id], ids, skip=False)) == " quick brown"


def test_a_character_that_the_prompt_began_is_completed(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("语")
    assert len(ids) >= 2
    assert "".join(pieces(byte_level, ids[:1], ids[1:])) == "语"


def test_invalid_bytes_do_not_stall_the_text(tokenizer: Tokenizer) -> None:
    lead = next(id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) == b"\xf0")
    released = pieces(tokenizer, [], [lead] * 50)
    assert "".join(released) == "�" * 50
    assert all(len(piece) == 1 for piece in released[1:])
    follow = next(id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) == b"\x80")
    assert "".join(pieces(tokenizer, [], [follow] * 5)[:-1]) == "�" * 5


def test_special_tokens_within_a_character_are_skipped_or_shown(byte_level: Tokenizer) -> None:
    first, *others = byte_level.encode("语")
    ids = [first, 2, *others]
    assert "".join(pieces(byte_level, [], ids)) == "语"
    assert "<|user|>" in "".join(pieces(byte_level, [], ids, skip=False))


def test_a_push_costs_the_same_however_long_the_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("The quick brown fox jumps 😀 over. ") * 20
    detokenizer = IncrementalDetokenizer(byte_level, [])

    def cost() -> float:
        start = time.process_time()
        for id in ids:
            detokenizer.push([id])
        return time.process_time() - start

    early = min(cost() for _ in range(3))
    for _ in range(60):
        late = cost()
    assert late < 20 * early + 0.01
