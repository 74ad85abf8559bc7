"""Texts become token files; what is held out is never trained on."""

from __future__ import annotations

import itertools
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from dsc_serve.train.corpus import END_OF_TEXT, Corpus, WindowSampler, prepare, split, text_files, train_tokenizer
from dsc_serve.train.sentences import paragraphs
from dsc_serve.train.settings import DataSettings, TrainError

VOCABULARY = 400


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(paragraphs(200, seed=1))
    (folder / "b.txt.xz").write_bytes(lzma.compress(paragraphs(100, seed=2).encode()))
    (folder / "notes.md").write_text("left alone")
    return text_files([folder])


@pytest.fixture
def corpus(texts: list[Path], tmp_path: Path) -> Corpus:
    return prepare(texts, DataSettings(held_out=0.1), VOCABULARY, tmp_path / "data")


def test_every_paragraph_is_trained_on_or_held_out() -> None:
    text = "\n\n".join(f"paragraph {i}" for i in range(1000))
    train, held = split(text, 0.02)
    assert len(held) == 4
    assert [len(stretch) for stretch in held] == [5, 5, 5, 5]
    both = [p for stretch in train + held for p in stretch]
    assert sorted(both) == sorted(text.split("\n\n"))


@pytest.mark.parametrize("kind", ['""', '"PreTrainedTokenizerFast"'])
def test_a_tokenizer_that_marks_texts_is_used_and_kept_without_its_marks(
    kind: str, texts: list[Path], corpus: Corpus, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    backend = Backend.from_file(str(corpus.folder / "tokenizer.json"))
    end = backend.token_to_id(END_OF_TEXT)
    backend.post_processor = processors.TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, end)])
    backend.save(str(given / "tokenizer.json"))
    (given / "tokenizer_config.json").write_text(f'{{"bos_token": "{END_OF_TEXT}", "tokenizer_class": {kind}}}')
    (given / "chat_template.jinja").write_text("{{ messages }}")
    made = prepare(texts, DataSettings(tokenizer=str(given)), VOCABULARY, tmp_path / "made")
    assert made.tokenizer.encode("It is") == corpus.tokenizer.encode("It is")
    assert made.tokenizer.chat_template is not None
    (given / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TrainError, match=rf"adds the tokens \[{end}\] to every text"):
        prepare(texts, DataSettings(tokenizer=str(given)), VOCABULARY, tmp_path / "refused")


def test_tokens_are_those_of_the_texts(texts: list[Path], corpus: Corpus, tmp_path: Path) -> None:
    assert [source.name for source in corpus.sources] == ["a", "b"]
    train, held = split(paragraphs(100, seed=2), 0.1)
    end = corpus.sources[0].trained
    decoded = corpus.tokenizer.decode(corpus.train[end:].tolist())
    assert decoded == "".join(f"{p}\n\n" for stretch in train for p in stretch)
    own = corpus.sources[1]
    decoded = corpus.tokenizer.decode(corpus.held[own.offset : own.offset + own.held].tolist())
    assert decoded == "".join(f"{p}\n\n" for stretch in held for p in stretch)
    assert decoded == (tmp_path / "data" / "held_out" / "b.txt").read_text()
    assert int((corpus.train == corpus.tokenizer.eos_token_id).sum()) == 10  # five stretches of either source


def test_held_out_windows_count_their_targets_bytes(corpus: Corpus) -> None:
    source = corpus.sources[0]
    windows = list(corpus.held_windows(source, 50))
    assert len(windows) == (source.held - 1) // 50
    for window, size in windows:
        assert len(corpus.tokenizer.decode(window[1:].tolist()).encode()) == size
    ((window, _),) = corpus.held_windows(source, 10**6)
    assert len(window) == source.held


def test_prepared_tokens_are_taken_again_and_others_refused(texts: list[Path], corpus: Corpus) -> None:
    before = (corpus.folder / "train.bin").stat().st_mtime_ns
    prepare(texts, DataSettings(held_out=0.1), VOCABULARY, corpus.folder)
    assert (corpus.folder / "train.bin").stat().st_mtime_ns == before
    with pytest.raises(TrainError, match="other texts or settings"):
        prepare(texts, DataSettings(held_out=0.2), VOCABULARY, corpus.folder)


def test_a_given_tokenizer_is_used(texts: list[Path], corpus: Corpus, tmp_path: Path) -> None:
    given = DataSettings(tokenizer=str(corpus.folder))
    again = prepare(texts, given, VOCABULARY, tmp_path / "again")
    assert (again.folder / "tokenizer.json").read_bytes() == (corpus.folder / "tokenizer.json").read_bytes()
    assert again.tokenizer.eos_token_id == corpus.tokenizer.eos_token_id
    with pytest.raises(TrainError, match="more than vocab_size"):
        prepare(texts, given, 300, tmp_path / "small")


def test_a_preparation_that_failed_leaves_nothing_to_the_next(texts: list[Path], tmp_path: Path) -> None:
    backend = train_tokenizer([paragraphs(50)], 300)
    given = tmp_path / "given"
    given.mkdir()
    backend.save(str(given / "tokenizer.json"))
    (given / "tokenizer_config.json").write_text('{"chat_template": "theirs"}')
    (tmp_path / "data" / "held_out").mkdir(parents=True)
    (tmp_path / "data" / "held_out" / "other.txt").write_text("of another text")
    with pytest.raises(TrainError, match="more than vocab_size"):
        prepare(texts, DataSettings(tokenizer=str(given)), 290, tmp_path / "data")
    corpus = prepare(texts, DataSettings(), VOCABULARY, tmp_path / "data")
    assert corpus.tokenizer.eos_token_id is not None
    assert "theirs" not in (corpus.folder / "tokenizer_config.json").read_text()
    assert [file.name for file in sorted((corpus.folder / "held_out").iterdir())] == ["a.txt", "b.txt"]


def test_an_epoch_visits_every_window_once() -> None:
    ids = np.arange(103, dtype=np.uint16)
    sampler = WindowSampler(ids, seed=3)
    first, second = (sampler.take(9, 10) for _ in range(2))
    for epoch in (first, second):
        starts = sorted(epoch[:, 0].tolist())
        assert [b - a for a, b in itertools.pairwise(starts)] == [10] * 8
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(11))
    assert not torch.equal(first, second)


def test_a_sampler_goes_on_from_its_count() -> None:
    ids = np.arange(500, dtype=np.uint16)
    whole, part = WindowSampler(ids, seed=1), WindowSampler(ids, seed=1)
    want = whole.take(70, 16)[40:]
    part.drawn = {16: 40}
    assert torch.equal(part.take(30, 16), want)


@pytest.mark.parametrize(("paragraphs_of", "held_out"), [(2, 1), (8, 1), (60, 1), (100, 2), (200, 4)])
def test_a_short_text_is_trained_on_too(paragraphs_of: int, held_out: int) -> None:
    train, held = split("\n\n".join(f"paragraph {i}" for i in range(paragraphs_of)), 0.02)
    assert sum(map(len, held)) == held_out
    assert sum(map(len, train)) == paragraphs_of - held_out


def test_lines_may_end_as_on_windows() -> None:
    text = paragraphs(40, seed=4)
    assert split(text.replace("\n", "\r\n"), 0.1) == split(text, 0.1)


@pytest.mark.parametrize("content", ["", "one paragraph only"])
def test_a_text_too_short_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(content)
    with pytest.raises(TrainError, match="short: too short"):
        prepare([tmp_path / "short.txt"], DataSettings(), VOCABULARY, tmp_path / "data")


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="two texts are called a"):
        text_files([tmp_path / "a.txt", tmp_path / "x" / "a.txt.xz"])


def test_a_run_that_has_moved_keeps_its_tokens_and_one_with_another_tokenizer_does_not(
    texts: list[Path], corpus: Corpus, tmp_path: Path
) -> None:
    run, given = tmp_path / "run", tmp_path / "run" / "tokenizer"
    shutil.copytree(corpus.folder, given)
    first = prepare(texts, DataSettings(tokenizer=str(given)), VOCABULARY, run / "data")
    run.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    again = prepare(texts, DataSettings(tokenizer=str(moved / "tokenizer")), VOCABULARY, moved / "data")
    assert again.fingerprint == first.fingerprint and again.folder == moved / "data"
    shutil.rmtree(moved / "tokenizer")
    gone = prepare(texts, DataSettings(tokenizer=str(moved / "tokenizer")), VOCABULARY, moved / "data")
    assert gone.fingerprint == first.fingerprint
    train_tokenizer([paragraphs(50)], VOCABULARY).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TrainError, match="holds tokens of other texts or settings"):
        prepare(texts, DataSettings(tokenizer=str(tmp_path)), VOCABULARY, moved / "data")


def test_a_tokenizer_within_the_run_s_own_data_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(paragraphs(60))
    own = tmp_path / "data" / "tokenizer.json"
    own.parent.mkdir()
    own.write_text("mine")
    for named in (own, own.parent):
        with pytest.raises(TrainError, match="where the run writes its own"):
            prepare([tmp_path / "text.txt"], DataSettings(tokenizer=str(named)), 300, own.parent)
    assert own.read_text() == "mine"
