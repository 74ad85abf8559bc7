"""Tokenizer folders in the forms that people have them, and what transformers makes of each.

Run as a program where transformers is installed, it adds that version's answers to `EXPECTED`:
`python tests/text/tokenizer_folders.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

EXPECTED = Path(__file__).parents[1] / "data" / "tokenizer_folders.json"
TEXTS = ["Hello there", "", "a<s>b</s> c", "x<tool>y [PAD] z", "<one><two> <extra>!", " lead <pic> trail "]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if pad_token is defined %}{{ pad_token }}{% endif %}"
)
Frame = processors.TemplateProcessing


def byte_level(frame: str | None = None, added: tuple[AddedToken, ...] = ()) -> tokenizers.Tokenizer:
    """Byte-level BPE of 260 tokens, <s> at 258 and </s> at 259 among them, and these added ones."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {token: 256 + i for i, token in enumerate(("He", "re", "<s>", "</s>"))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("H", "e"), ("r", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return framed(backend, frame, added)


def pieces(frame: str | None = None, added: tuple[AddedToken, ...] = ()) -> tokenizers.Tokenizer:
    """Pieces with ▁ for spaces, as Llama's first tokenizer has them, and these added tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Helortxyzabc", "▁H", "er"]
    merges = [("▁", "H"), ("e", "r")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return framed(backend, frame, added)


def framed(backend: tokenizers.Tokenizer, frame: str | None, added: tuple[AddedToken, ...]) -> tokenizers.Tokenizer:
    backend.add_tokens(list(added))
    if frame is not None:
        marks = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = Frame(frame, special_tokens=marks)
    return backend


def special(text: str, **flags: bool) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, **flags)


MARKS = (special("<s>"), special("</s>"))
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False}


def entry(text: str, special: bool, normalized: bool = False, **flags: bool) -> dict[str, Any]:
    return {"content": text, "special": special, "normalized": normalized, **PLAIN, **flags}


def config(**fields: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **fields}


Folder = tuple[Callable[[], tokenizers.Tokenizer], dict[str, dict[str, Any]]]
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FOLDERS: dict[str, Folder] = {
    "tokenizer.json alone": (lambda: byte_level(added=MARKS), {}),
    "names in the config": (lambda: byte_level(added=MARKS), {CONFIG: config(**NAMED)}),
    "names in the map": (lambda: byte_level(added=MARKS), {CONFIG: config(), MAP: dict(NAMED)}),
    "a map without a config": (lambda: byte_level(added=MARKS), {MAP: dict(NAMED)}),
    "the map overrides the config": (
        lambda: byte_level(added=MARKS),
        {CONFIG: config(bos_token="</s>", eos_token="<s>"), MAP: {**NAMED, "pad_token": entry("<tool>", True)}},
    ),
    "the map takes a name back": (
        lambda: byte_level(added=MARKS),
        {CONFIG: config(**NAMED, pad_token="<s>"), MAP: {"pad_token": None}},
    ),
    "added_tokens_decoder makes the map void": (
        lambda: byte_level(added=MARKS),
        {
            CONFIG: config(**NAMED, added_tokens_decoder={"258": entry("<s>", True), "259": entry("</s>", True)}),
            MAP: {"bos_token": "</s>", "eos_token": "<s>", "pad_token": "<tool>"},
        },
    ),
    "an empty added_tokens_decoder makes the map void too": (
        lambda: byte_level(added=MARKS),
        {CONFIG: config(**NAMED, added_tokens_decoder={}), MAP: {"bos_token": "</s>"}},
    ),
    "names of tokens that are not added ones": (lambda: byte_level(), {CONFIG: config(**NAMED)}),
    "names of tokens that are nowhere else": (
        lambda: byte_level(added=MARKS),
        {CONFIG: config(**NAMED, pad_token="[PAD]", unk_token="<one>")},
    ),
    "a name in the map of a token that is nowhere else": (
        lambda: byte_level(added=MARKS),
        {CONFIG: config(**NAMED), MAP: {"pad_token": "[PAD]"}},
    ),
    "tokens only in added_tokens_decoder": (
        lambda: byte_level(added=MARKS),
        {
            CONFIG: config(
                **NAMED,
                added_tokens_decoder={
                    "258": entry("<s>", True),
                    "259": entry("</s>", True),
                    "260": entry("<tool>", False),
                    "261": entry("[PAD]", True),
                    "262": entry("<two>", True, lstrip=True, rstrip=True),
                },
            )
        },
    ),
    "added_tokens_decoder changes flags": (
        lambda: byte_level(added=(*MARKS, special("<tool>"))),
        {CONFIG: config(**NAMED, added_tokens_decoder={"260": entry("<tool>", False, lstrip=True)})},
    ),
    "tokens only in added_tokens.json": (
        lambda: byte_level(added=MARKS),
        {CONFIG: config(**NAMED), ADDED: {"[PAD]": 261, "<tool>": 260}},
    ),
    "added_tokens.json names one that the map calls special": (
        lambda: byte_level(added=MARKS),
        {CONFIG: config(**NAMED), MAP: {**NAMED, "pad_token": "[PAD]"}, ADDED: {"[PAD]": 260, "<tool>": 261}},
    ),
    "added_tokens.json beside tokenizer.json's own": (
        lambda: byte_level(added=(*MARKS, special("<tool>", lstrip=True))),
        {CONFIG: config(**NAMED), ADDED: {"<tool>": 260, "<two>": 261}},
    ),
    "tokens only in additional_special_tokens": (
        lambda: byte_level(added=MARKS),
        {CONFIG: config(**NAMED, additional_special_tokens=["<one>", "<two>"])},
    ),
    "additional_special_tokens in the map": (
        lambda: byte_level(added=MARKS),
        {CONFIG: config(**NAMED), MAP: {**NAMED, "additional_special_tokens": ["<two>", "<one>"]}},
    ),
    "additional_special_tokens in added_tokens.json too": (
        lambda: byte_level(added=MARKS),
        {CONFIG: config(**NAMED, additional_special_tokens=["<one>"]), ADDED: {"<two>": 260, "<one>": 261}},
    ),
    "extra_special_tokens": (
        lambda: byte_level(added=MARKS),
        {CONFIG: config(**NAMED, extra_special_tokens={"image_token": "<pic>"})},
    ),
    "pieces and tokens in added_tokens_decoder": (
        lambda: pieces("<s> $A", MARKS),
        {
            CONFIG: config(
                **NAMED,
                unk_token="<unk>",
                added_tokens_decoder={
                    "0": entry("<unk>", True),
                    "1": entry("<s>", True),
                    "2": entry("</s>", True),
                    "274": entry("<tool>", False, normalized=True),
                    "275": entry("<extra>", True),
                },
            )
        },
    ),
    **{
        f"{name} says add {add}, {'framed' if frame else 'bare'}": (
            lambda frame=frame: byte_level(frame, MARKS),  # type: ignore[misc]
            {CONFIG: {**config(**NAMED), "tokenizer_class": name, "add_bos_token": add, "add_eos_token": add}},
        )
        for name in ("PreTrainedTokenizerFast", "GPT2TokenizerFast", "Qwen2Tokenizer")
        for add in (True, False)
        for frame in (None, "<s> $A </s>")
    },
}


def write(name: str, folder: Path) -> None:
    build, files = FOLDERS[name]
    build().save(str(folder / "tokenizer.json"))
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content), "utf8")


def answers(name: str) -> dict[str, Any]:
    """What transformers makes of a folder."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind = AutoTokenizer if CONFIG in FOLDERS[name][1] else PreTrainedTokenizerFast
    with tempfile.TemporaryDirectory() as place:
        write(name, Path(place))
        (Path(place) / "config.json").write_text('{"model_type": "llama"}')
        tokenizer = kind.from_pretrained(place)
    found: dict[str, Any] = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "texts": []}
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        shown, hidden = (tokenizer.decode(ids, skip_special_tokens=skip) for skip in (False, True))
        found["texts"].append({"ids": ids, "shown": shown, "hidden": hidden})
    if FOLDERS[name][1].get(CONFIG, {}).get("tokenizer_class") == "PreTrainedTokenizerFast":
        found["chat"] = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    return found


if __name__ == "__main__":
    import transformers

    kept = json.loads(EXPECTED.read_text("utf8")) if EXPECTED.exists() else {}
    kept[f"transformers {transformers.__version__}"] = {name: answers(name) for name in FOLDERS}
    EXPECTED.write_text(json.dumps(kept, ensure_ascii=False, sort_keys=True) + "\n", "utf8")
