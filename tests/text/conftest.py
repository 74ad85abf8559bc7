"""Two small tokenizers, one of each kind that models use, trained or spelled out here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from dsc_serve.text.tokenizer import Tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "A router picks a few atoms of the bank for every token it reads.",
    "Bread, milk and honey: three things that the old baker never forgot.",
    "Das Mädchen aß Äpfel, während die Brücke über den Fluß gebaut wurde.",
    "数据 很 重要 。 你好 世界 !",
    "Emoji 😀 😁 👩‍🚀 come in families.",
]
SPECIALS = ["<|bos|>", "<|eos|>", "<|user|>"]


def byte_level_backend() -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2 and its descendants use it; most emoji and Chinese characters span several tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_tokens([AddedToken("<tool é>", special=False)])
    return backend


def metaspace_backend() -> tokenizers.Tokenizer:
    """Word pieces with ▁ for spaces and <0xXX> for bytes that no piece covers, as in Llama's first tokenizer."""
    words = sorted({word for sentence in SENTENCES[:3] for word in sentence.split()})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁"]
    pieces += [f"▁{word}" for word in words] + sorted({char for word in words for char in word})
    vocab = [(piece, 0.0 if piece.startswith("<") else -float(i)) for i, piece in enumerate(dict.fromkeys(pieces))]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return backend


@pytest.fixture(scope="session")
def byte_level_library() -> tokenizers.Tokenizer:
    return byte_level_backend()


@pytest.fixture(scope="session")
def metaspace_library() -> tokenizers.Tokenizer:
    return metaspace_backend()


@pytest.fixture
def fresh_backend() -> tokenizers.Tokenizer:
    """A byte-level tokenizer of the library that a test may change."""
    return byte_level_backend()


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), bos_token_id=0, eos_token_id=1)


@pytest.fixture(scope="session")
def metaspace() -> Tokenizer:
    backend = metaspace_backend()
    return Tokenizer(backend, bos_token_id=backend.token_to_id("<s>"), eos_token_id=backend.token_to_id("</s>"))


@pytest.fixture(params=["byte_level", "metaspace"], scope="session")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    chosen: Tokenizer = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder with the byte-level tokenizer and, if given, the fields of tokenizer_config.json."""

    def write(backend: tokenizers.Tokenizer | None = None, **config: object) -> Path:
        (backend or byte_level_backend()).save(str(tmp_path / "tokenizer.json"))
        if config:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return tmp_path

    return write
