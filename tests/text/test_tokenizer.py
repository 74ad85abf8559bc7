from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from dsc_serve.text.tokenizer import Tokenizer, TokenizerError

Folder = Callable[..., Path]
SENTENCE = "The old baker never forgot bread, milk and honey."
TEXTS = [SENTENCE, "Äpfel 你好 😀 😁", "  two spaces\n\ttab", "", "👩‍🚀🇦🇹 한국어", "\x00\x07"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(max_size=40))
def test_any_text_survives_byte_level_encoding(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode_chat(text), skip_special_tokens=False) == text


@given(ids=st.lists(st.integers(0, 345), max_size=30), skip=st.booleans())
def test_byte_level_decoding_agrees_with_the_library_even_on_invalid_bytes(
    byte_level: Tokenizer, byte_level_library: tokenizers.Tokenizer, ids: list[int], skip: bool
) -> None:
    backend = byte_level_library
    ids = [id for id in ids if backend.id_to_token(id) != "<tool é>"]  # the library misreads é in added tokens
    assert byte_level.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


@given(data=st.data(), skip=st.booleans())
def test_metaspace_decoding_agrees_with_the_library_on_valid_text(
    metaspace: Tokenizer, metaspace_library: tokenizers.Tokenizer, data: st.DataObject, skip: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, metaspace.vocab_size - 1), max_size=20))
    expected = metaspace_library.decode(ids, skip_special_tokens=skip)
    if "�" not in expected:
        assert metaspace.decode(ids, skip) == expected


def test_other_local_decoders_agree_with_the_library() -> None:
    vocab = {"he": 0, "##llo": 1, "world": 2, ".": 3}
    for decoder in (decoders.WordPiece(), None, decoders.Metaspace()):
        backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="."))
        if decoder is not None:
            backend.decoder = decoder
        for ids in ([0, 1, 2, 3], [2], [], [1, 1]):
            assert Tokenizer(backend).decode(ids) == backend.decode(ids)


def test_a_decoder_that_cannot_be_followed_is_refused_by_name(
    model_folder: Folder, fresh_backend: tokenizers.Tokenizer
) -> None:
    fresh_backend.decoder = decoders.BPEDecoder("")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: decoder BPEDecoder has an empty suffix"):
        Tokenizer.load(model_folder(fresh_backend))


def test_ids_outside_the_vocabulary_decode_to_nothing(tokenizer: Tokenizer) -> None:
    beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 1000, 2**40, -1]
    assert tokenizer.decode(beyond) == ""
    assert [tokenizer.token_text(id) for id in beyond] == [""] * 4
    assert [tokenizer.token_bytes(id) for id in beyond] == [b""] * 4
    word = tokenizer.encode("the")
    assert tokenizer.decode([*beyond, *word, *beyond]) == "the"


def test_tokens_that_are_parts_of_characters_have_distinct_texts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀", add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(id) for id in ids).decode().lstrip() == "😀"
    assert "bytes:\\x98" in {tokenizer.token_text(id) for id in tokenizer.encode("\u0618")}
    texts = [tokenizer.token_text(id) for id in range(tokenizer.vocab_size)]
    assert not any("�" in text for text in texts)
    high = [text for text in texts if text.startswith("bytes:")]
    assert len(high) == len(set(high)) >= 128


def test_metaspace_tokens_show_spaces_and_bytes(metaspace: Tokenizer, metaspace_library: tokenizers.Tokenizer) -> None:
    ids = metaspace_library.get_vocab()
    assert metaspace.token_text(ids["▁quick"]) == " quick"
    assert metaspace.token_bytes(ids["<0x0A>"]) == b"\n"
    assert metaspace.token_text(ids["<0xE4>"]) == "bytes:\\xe4"
    assert metaspace.token_text(ids["<s>"]) == "<s>"


def test_special_tokens_are_skipped_or_shown(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<|user|>hi<|eos|>")
    assert byte_level.is_special(ids[0]) and not byte_level.is_special(ids[1])
    assert byte_level.decode(ids) == "hi"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<|user|>hi<|eos|>"


def test_added_tokens_that_are_not_special_are_text(byte_level: Tokenizer) -> None:
    assert byte_level.decode(byte_level.encode("a<tool é>b")) == "a<tool é>b"


def test_load_reads_the_named_tokens(model_folder: Folder) -> None:
    tokenizer = Tokenizer.load(model_folder(bos_token={"content": "<|bos|>"}, eos_token="<|eos|>", pad_token=None))
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template) == (0, 1, None)
    assert tokenizer.encode("hi")[0] != 0


def test_add_bos_token_is_honoured_once(model_folder: Folder, fresh_backend: tokenizers.Tokenizer) -> None:
    config = {"bos_token": "<|bos|>", "add_bos_token": True}
    tokenizer = Tokenizer.load(model_folder(**config))
    assert tokenizer is not None
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == [0, *plain]
    assert tokenizer.encode_chat("hi") == plain
    backend = fresh_backend
    backend.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer = Tokenizer.load(model_folder(backend, **config))
    assert tokenizer is not None
    assert tokenizer.encode("hi") == [0, *plain]


@pytest.mark.parametrize(
    ("said", "before", "after"),
    [
        ({}, [0], [1]),
        ({"add_bos_token": False}, [], [1]),
        ({"add_eos_token": False}, [0], []),
        ({"add_bos_token": False, "add_eos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"add_bos_token": None}, [0], [1]),
    ],
)
def test_the_settings_decide_which_marks_a_prompt_gets(
    said: dict[str, object],
    before: list[int],
    after: list[int],
    model_folder: Folder,
    fresh_backend: tokenizers.Tokenizer,
) -> None:
    fresh_backend.post_processor = processors.TemplateProcessing(
        "<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    tokenizer = Tokenizer.load(model_folder(fresh_backend, bos_token="<|bos|>", eos_token="<|eos|>", **said))
    assert tokenizer is not None
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == [*before, *plain, *after]
    assert tokenizer.encode("") == [*before, *after]
    assert tokenizer.encode_chat("hi") == plain


def test_marks_that_are_added_stand_outside_of_others(
    model_folder: Folder, fresh_backend: tokenizers.Tokenizer
) -> None:
    user = fresh_backend.token_to_id("<|user|>")
    fresh_backend.post_processor = processors.TemplateProcessing(
        "<|user|> $A <|user|>", special_tokens=[("<|user|>", user)]
    )
    said = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "add_bos_token": True, "add_eos_token": True}
    tokenizer = Tokenizer.load(model_folder(fresh_backend, **said))
    assert tokenizer is not None
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == [0, user, *plain, user, 1]


def test_prompts_are_never_cut_or_padded(model_folder: Folder, fresh_backend: tokenizers.Tokenizer) -> None:
    backend = fresh_backend
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.load(model_folder(backend))
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode(SENTENCE)) == SENTENCE


def test_a_folder_without_tokenizer_loads_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json cannot be read: Model missing"),
        ("tokenizer.json", "\x00", r"tokenizer\.json cannot be read"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json cannot be read"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds a list; it must hold a JSON object"),
        ("special_tokens_map.json", "[]", r"special_tokens_map\.json holds a list; it must hold a JSON object"),
    ],
)
def test_broken_files_are_named_in_one_line(model_folder: Folder, file: str, content: str, message: str) -> None:
    folder = model_folder()
    (folder / file).write_text(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)


def test_text_that_cannot_be_encoded_is_an_error(byte_level: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate"):
        byte_level.encode("\ud800")
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        Tokenizer(backend).encode("b")


def test_importing_text_loads_no_torch() -> None:
    code = "import dsc_serve.text.stream, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
