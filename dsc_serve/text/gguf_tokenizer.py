"""The tokenizer in a GGUF file's metadata as one of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dsc_serve.text.chat import one_line
from dsc_serve.text.cuts import CUTS

# Tokens that end a text by what they are called, as llama.cpp has it: most files name only one of theirs as an end.
ENDS = {
    *("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>"),
    *("<|call|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "< EOT >", "<｜end▁of▁sentence｜>"),
}


class ConversionError(ValueError):
    """A tokenizer that cannot be converted; one line."""


class Kind(IntEnum):
    """The token types of GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Special tokens of files that name none, or one that they do not have, as SentencePiece itself numbers them.
SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}


def converted_tokenizer(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and its `tokenizer_config.json`.

    metadata: the file's fields below `tokenizer.`, without `ggml.`. Raises ConversionError naming what is not
    supported.
    """
    model = metadata.get("model")
    converters = {"gpt2": byte_level, "llama": sentencepiece}
    if model not in converters:
        raise ConversionError(f"tokenizer {model!r} is not supported; supported: {', '.join(converters)}")
    tokens = metadata.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ConversionError("tokenizer.ggml.tokens is missing or not a list of texts")
    kinds = metadata.get("token_type") or [Kind.NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise ConversionError(f"tokenizer.ggml.token_type has {len(kinds)} entries; expected {len(tokens)}")
    try:
        tokenizer, adds_bos = converters[model](metadata, tokens)
    except ConversionError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ConversionError(f"tokenizer: {one_line(error)}") from error
    kinds = [Kind.CONTROL if token in ENDS else kind for token, kind in zip(tokens, kinds, strict=True)]
    for kind in (Kind.CONTROL, Kind.USER_DEFINED):
        added = [
            AddedToken(token, normalized=False, special=kind == Kind.CONTROL)
            for token, own in zip(tokens, kinds, strict=True)
            if own == kind
        ]
        tokenizer.add_tokens(added)
    named = named_tokens(metadata, tokens)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    marks = [AddedToken(token, normalized=False, special=True) for token in named.values() if token not in known]
    tokenizer.add_tokens(marks)
    frame(tokenizer, metadata, named, adds_bos)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    if isinstance(metadata.get("chat_template"), str):
        settings["chat_template"] = metadata["chat_template"]
    return tokenizer, settings


def named_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    """The texts of the special tokens that the file names, as `tokenizer_config.json` calls them."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {name: special_id(metadata, field, len(tokens)) for field, name in names.items()}
    return {f"{name}_token": tokens[id] for name, id in ids.items() if id is not None}


def special_id(metadata: Mapping[str, Any], field: str, size: int) -> int | None:
    """The id of a special token ("bos", "eos", "eot", "eom", "unknown", "padding"); None where the file has none.

    metadata: as in `converted_tokenizer`. One that is not below `size` counts for none, as in llama.cpp: such files
    were made from configurations that say -1, or of a larger vocabulary. Raises ConversionError when it is no number.
    """
    token = metadata.get(f"{field}_token_id")
    if token is not None and not isinstance(token, int):
        raise ConversionError(f"tokenizer.ggml.{field}_token_id is {token!r}; it must be a number")
    if token is None or not 0 <= token < size:
        token = SENTENCEPIECE_IDS.get(field, size) if metadata.get("model") == "llama" else size
    return token if token < size else None


def start_and_ends(metadata: Mapping[str, Any], vocab_size: int) -> tuple[int | None, list[int]]:
    """The token before a text and those that end one, of those that the model has.

    metadata: as in `converted_tokenizer`. vocab_size: how many tokens the model has. Raises ConversionError.
    """
    tokens = metadata.get("tokens")
    tokens = tokens[:vocab_size] if isinstance(tokens, list) else []
    named = [special_id(metadata, field, len(tokens)) for field in ("eos", "eot", "eom")]
    ends = {i for i, token in enumerate(tokens) if token in ENDS}.union(id for id in named if id is not None)
    return special_id(metadata, "bos", len(tokens)), sorted(ends)


def frame(tokenizer: Tokenizer, metadata: Mapping[str, Any], named: Mapping[str, str], adds_bos: bool) -> None:
    """Have prompts begin and end with the tokens that the file says."""
    flags = {"bos": metadata.get("add_bos_token", adds_bos), "eos": metadata.get("add_eos_token", False)}
    marks = {name: named[f"{name}_token"] for name, on in flags.items() if on and f"{name}_token" in named}
    if not marks:
        return
    parts = [marks.get("bos"), "$A", marks.get("eos")]
    tokenizer.post_processor = processors.Sequence(
        [
            *([tokenizer.post_processor] if tokenizer.post_processor is not None else []),
            processors.TemplateProcessing(
                single=[part for part in parts if part is not None],
                special_tokens=[(token, tokenizer.token_to_id(token)) for token in set(marks.values())],
            ),
        ]
    )


def byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE with the file's merges."""
    name = metadata.get("pre") or "default"
    cut = CUTS.get(name) if isinstance(name, str) else None
    if cut is None:
        raise ConversionError(f"tokenizer.ggml.pre {name!r} is not supported; supported: {', '.join(CUTS)}")
    merges = metadata.get("merges")
    if not isinstance(merges, list):
        raise ConversionError("tokenizer.ggml.merges is missing")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=cut.whole_words))
    if cut.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cut.bos


def sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE: the pair whose joint token has the highest score is merged first."""
    scores = metadata.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ConversionError(f"tokenizer.ggml.scores must hold {len(tokens)} numbers")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for token, score in zip(tokens, scores, strict=True):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        pairs += [(-score, pair) for pair in known]
    pairs.sort(key=lambda entry: entry[0])
    unknown = special_id(metadata, "unknown", len(tokens))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[pair for _, pair in pairs],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = metadata.get("add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefixed else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            *([decoders.Strip(" ", 1, 0)] if prefixed else []),
        ]
    )
    return tokenizer, True
