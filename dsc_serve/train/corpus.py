"""Text files into memory-mapped token files, with a part of every source held out."""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from dsc_serve.text.tokenizer import CONFIG_FILE, FILES, TOKENIZER_FILE, Tokenizer, read_config
from dsc_serve.train.checkpoint import write_whole
from dsc_serve.train.settings import DataSettings, TrainError

END_OF_TEXT = "<|endoftext|>"
BREAK = "\n\n"
HELD_OUT = "held_out"  # folder of the held-out texts, to be measured by other means
STRETCHES = 4  # held-out stretches of one source, evenly spaced, so that they tell of all of it
BLOCK = 64  # paragraphs encoded together
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}\n\n{% endfor %}"

Ids = npt.NDArray[Any]


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and the *.txt and *.txt.xz files of the folders named, sorted. Raises TrainError."""
    files: list[Path] = []
    for path in paths:
        found = sorted(f for f in path.iterdir() if f.name.endswith((".txt", ".txt.xz"))) if path.is_dir() else [path]
        if not found:
            raise TrainError(f"{path}: holds no *.txt or *.txt.xz file")
        files += found
    names = [source_name(file) for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TrainError(f"two texts are called {twice[0]}; sources are told apart by their file names")
    for file in files:
        if not file.exists():
            raise TrainError(f"{file}: no such file or folder")
    if not files:
        raise TrainError("no text given; name files or folders of *.txt or *.txt.xz with --text")
    return files


def source_name(file: Path) -> str:
    return file.name.removesuffix(".xz").removesuffix(".txt")


def read_text(file: Path) -> str:
    """A text file, unpacked where its name ends in .xz. Raises TrainError when it is not UTF-8."""
    try:
        data = file.read_bytes()
        return (lzma.decompress(data) if file.suffix == ".xz" else data).decode("utf8")
    except FileNotFoundError:
        raise TrainError(f"{file}: no such file") from None
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise TrainError(f"{file}: not readable UTF-8 text: {error}") from None


def split(text: str, held_out: float) -> tuple[list[list[str]], list[list[str]]]:
    """Training and held-out stretches of paragraphs, in the text's order; a short text has fewer held-out ones."""
    paragraphs = [block.strip() for block in text.replace("\r\n", "\n").split(BREAK) if block.strip()]
    n = len(paragraphs)
    count = min(STRETCHES, n // 2, max(1, round(n * held_out)))
    size = max(1, round(n * held_out / STRETCHES))
    train, held, start = [], [], 0
    for i in range(count):
        cut = (2 * i + 1) * n // (2 * count) - size // 2
        train.append(paragraphs[start:cut])
        held.append(paragraphs[cut : cut + size])
        start = cut + size
    train.append(paragraphs[start:])
    return [stretch for stretch in train if stretch], held


def train_tokenizer(paragraphs: Iterable[str], vocab_size: int) -> Backend:
    """A byte-level BPE; paragraph breaks are tokens of their own."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BREAK), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise TrainError(f"vocab_size is {vocab_size}; a byte-level BPE needs at least {len(alphabet) + 1}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(paragraphs, trainer)
    return backend


@dataclass(frozen=True)
class Source:
    """One text's held-out tokens: `held` of them from `offset` in the held-out file; `trained` is a count of tokens."""

    name: str
    trained: int
    offset: int
    held: int


class Corpus:
    """The token files of a run's data folder. Raises TrainError where they are missing or damaged."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text("utf8"))
        self.fingerprint: str = index["fingerprint"]
        self.sources = [Source(**entry) for entry in index["sources"]]
        tokenizer = Tokenizer.load(folder)
        if tokenizer is None:
            raise TrainError(f"{folder}: {TOKENIZER_FILE} is missing")
        self.tokenizer, self.folder = tokenizer, folder
        dtype = np.dtype(index["dtype"])
        self.train: Ids = np.memmap(folder / "train.bin", dtype, "r")
        self.held: Ids = np.memmap(folder / "held.bin", dtype, "r")
        sizes = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
        self.token_bytes = np.array(sizes, dtype=np.int64)

    def held_windows(self, source: Source, length: int) -> Iterator[tuple[Tensor, int]]:
        """Windows int64 [≤ length + 1] over a source's held-out tokens that share their edge, and their targets' bytes.

        All full windows; a source shorter than one gives one window of what there is.
        """
        ids = self.held[source.offset : source.offset + source.held].astype(np.int64)
        for start in range(0, max(1, len(ids) - length), length):
            window = ids[start : start + length + 1]
            if len(window) > 1:
                yield torch.from_numpy(window), int(self.token_bytes[window[1:]].sum())


def prepare(files: Sequence[Path], settings: DataSettings, vocab_size: int, folder: Path) -> Corpus:
    """Tokenise the texts into `folder`, or take what is there already from the same texts and settings."""
    fingerprint = _fingerprint(files, settings, vocab_size, folder)
    if (folder / "index.json").is_file():
        corpus = Corpus(folder)
        if corpus.fingerprint != fingerprint:
            raise TrainError(f"{folder}: holds tokens of other texts or settings; name another run folder")
        return corpus
    given = None if settings.tokenizer is None else Path(settings.tokenizer).resolve()
    if given is not None and folder.resolve() in (given, given.parent):
        raise TrainError(f"data.tokenizer is {settings.tokenizer!r}, where the run writes its own; name another place")
    shutil.rmtree(folder / HELD_OUT, ignore_errors=True)  # what a preparation that failed has left behind
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / HELD_OUT).mkdir(parents=True)
    parts = {source_name(file): split(read_text(file), settings.held_out) for file in files}
    for name, (train, held) in parts.items():
        if not train or not held:
            raise TrainError(f"{name}: too short; a source needs two paragraphs or more, with blank lines between")
    tokenizer = _tokenizer(parts, settings, vocab_size, folder)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    sources, offset = [], 0
    with (folder / "train.bin").open("wb") as train_file, (folder / "held.bin").open("wb") as held_file:
        for name, (train, held) in parts.items():
            trained = 0
            for stretch in train:
                ids = np.array([*encode(tokenizer, stretch), *end], dtype=dtype)
                train_file.write(ids.tobytes())
                trained += len(ids)
            kept = np.array([i for stretch in held for i in encode(tokenizer, stretch)], dtype=dtype)
            if len(kept) < 2:
                raise TrainError(f"{name}: its held-out part has {len(kept)} tokens; a loss needs at least 2")
            (folder / HELD_OUT / f"{name}.txt").write_text("".join(f"{p}{BREAK}" for s in held for p in s), "utf8")
            held_file.write(kept.tobytes())
            sources.append({"name": name, "trained": trained, "offset": offset, "held": len(kept)})
            offset += len(kept)
    index = {"fingerprint": fingerprint, "dtype": dtype.name, "sources": sources}
    write_whole(folder / "index.json", json.dumps(index, indent=2) + "\n")  # last: what has an index is whole
    return Corpus(folder)


def encode(tokenizer: Tokenizer, paragraphs: Sequence[str]) -> Iterator[int]:
    for start in range(0, len(paragraphs), BLOCK):
        text = BREAK.join(paragraphs[start : start + BLOCK])
        yield from tokenizer.encode(text + BREAK, add_special_tokens=False)


def _tokenizer(
    parts: dict[str, tuple[list[list[str]], list[list[str]]]], settings: DataSettings, vocab_size: int, folder: Path
) -> Tokenizer:
    if settings.tokenizer is None:
        backend = train_tokenizer((p for train, _ in parts.values() for s in train for p in s), vocab_size)
        backend.save(str(folder / TOKENIZER_FILE))
    else:
        given = Path(settings.tokenizer)
        file = given / TOKENIZER_FILE if given.is_dir() else given
        if not file.is_file():
            raise TrainError(f"data.tokenizer is {settings.tokenizer!r}: no {TOKENIZER_FILE} there")
        shutil.copyfile(file, folder / TOKENIZER_FILE)
        for name in set(FILES) - {TOKENIZER_FILE}:
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
    if not (folder / CONFIG_FILE).is_file():
        has_end = Backend.from_file(str(folder / TOKENIZER_FILE)).token_to_id(END_OF_TEXT) is not None
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "chat_template": CHAT_TEMPLATE}
        config |= {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT} if has_end else {}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf8")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    if tokenizer.encode(""):  # training reads texts without such marks, so the model must be served without them
        config = read_config(folder / CONFIG_FILE) | {"add_bos_token": False, "add_eos_token": False}
        config.pop("tokenizer_class", None)  # some do not heed these two
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf8")
        tokenizer = Tokenizer.load(folder)
        assert tokenizer is not None
    if marks := tokenizer.encode(""):
        why = "which are not the bos_token in front or the eos_token behind, and cannot be left out"
        raise TrainError(f"the tokenizer adds the tokens {marks} to every text, {why}")
    if tokenizer.vocab_size > vocab_size:
        raise TrainError(f"the tokenizer has {tokenizer.vocab_size} tokens, more than vocab_size, {vocab_size}")
    return tokenizer


def _fingerprint(files: Sequence[Path], settings: DataSettings, vocab_size: int, folder: Path) -> str:
    """Of content, whatever it is called and wherever it lies: a run may be moved, and be named in another way."""
    named = None if settings.tokenizer is None else _tokenizer_digest(Path(settings.tokenizer), folder)
    digest = hashlib.sha256(
        f"{vocab_size} {settings.model_copy(update={'tokenizer': named}).model_dump_json()}".encode()
    )
    for file in files:
        digest.update(source_name(file).encode())
        try:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        except FileNotFoundError:
            raise TrainError(f"{file}: no such file") from None
    return digest.hexdigest()


def _tokenizer_digest(given: Path, folder: Path) -> str:
    """Where what was given is gone, of the copy that a data folder has; "": there is none."""
    file = given / TOKENIZER_FILE if given.is_dir() else given
    if not file.is_file():
        file = folder / TOKENIZER_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


class WindowSampler:
    """Windows of the training tokens: every epoch visits each once, in an order that seed and epoch decide.

    drawn: windows taken so far by length; the sampler's whole state.
    """

    def __init__(self, ids: Ids, seed: int) -> None:
        self.ids, self.seed = ids, seed
        self.drawn: dict[int, int] = {}
        self._orders: dict[tuple[int, int], tuple[int, Ids]] = {}

    def take(self, count: int, length: int) -> Tensor:
        """The next windows, int64 [count, length + 1]. Raises TrainError when the text is shorter than one."""
        per_epoch = (len(self.ids) - 1) // length - 1
        if per_epoch < 1:
            raise TrainError(f"the texts have {len(self.ids)} training tokens; windows of {length} need more")
        first = self.drawn.get(length, 0)
        self.drawn[length] = first + count
        rows = []
        for n in range(first, first + count):
            shift, order = self._order(length, n // per_epoch, per_epoch)
            start = shift + int(order[n % per_epoch]) * length
            rows.append(self.ids[start : start + length + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _order(self, length: int, epoch: int, count: int) -> tuple[int, Ids]:
        key = (length, epoch)
        if key not in self._orders:
            rng = np.random.default_rng((self.seed, length, epoch))
            self._orders = {key: (int(rng.integers(length)), rng.permutation(count))}
        return self._orders[key]
