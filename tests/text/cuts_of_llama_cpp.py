"""Writes `EXPECTED`: the words into which llama.cpp's expressions cut some texts, by another engine than ours.

`python tests/text/cuts_of_llama_cpp.py LLAMA_VOCAB_CPP VERSION`, where the package regex is installed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

EXPECTED = Path(__file__).parents[1] / "data" / "cuts.json"
TEXTS = [
    "Hello, World! It's 12345 o'clock, they'LL say: <<x>>=`a`+1;",
    "  two  spaces\n\n\ttabs \r\n end  ",
    "def foo_bar(x1, y22):\n    return x1**2 + y22/3  # ok?\n",
    "XMLHttpRequest iPhone McDONALD ÄrgerÜbel Ελλάδα ПРИВЕТмир",
    "数据很重要。你好，世界！ 12年3月 カタカナひらがな 한국어 ไทย",
    "naïve cafe\u0301 \u0938\u092e\u0938\u094d\u0924\u0947 ١٢٣ ½ ²",
    "👩‍🚀🇦🇹 $100.50 €20 (a|b)…“quote”—dash ‘x’",
    "a\u00a0b\u3000c\u2028d 1\n2\n\n3",
    "'s 'S 'll're we'Ve I'm!!!???...",
    "/usr/bin//x http://a.b/c?d=e&f=g#h\n//\n",
]
LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')
ORIGINAL = ("TEKKEN", "GPT4O", "MINIMAX_M2")  # llama.cpp comes only near to these tokenizers, but quotes what is theirs


def unescaped(literal: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n", "r": "\r", "t": "\t"}.get(found[1], found[1]), literal)


def expressions(source: str) -> dict[str, list[str]]:
    """Those of each kind of cut."""
    body = source[source.index("switch (vocab.get_pre_type())") :]
    kinds: dict[str, list[str]] = {}
    pending: list[str] = []
    found: list[str] | None = None
    quoted = ""
    for line in map(str.strip, body[: body.index("std::vector<std::string> regex_exprs;")].splitlines()):
        if kind := re.match(r"case LLAMA_VOCAB_PRE_TYPE_(\w+):|(default):", line):
            pending.append(kind[1] or "DEFAULT")
        elif line.startswith("regex_exprs = {"):
            found = []
        elif line.startswith("};") and found is not None:
            kinds |= {kind: [quoted] if kind in ORIGINAL else found for kind in pending}
            found = None
        elif line.startswith("break;"):
            pending = []
        elif literal := LITERAL.search(line):
            if line.startswith("//"):
                quoted = unescaped(literal[1])
            elif found is not None:
                found.append(unescaped(literal[1]))
    return kinds


def names(source: str) -> dict[str, str]:
    """The kind of cut that each name in a file means."""
    start = source.index('tokenizer_pre == "default"')
    kinds: dict[str, str] = {}
    pending: list[str] = []
    for line in source[start : source.index("unknown pre-tokenizer type", start)].splitlines():
        pending += re.findall(r'tokenizer_pre == "([^"]+)"', line)
        if kind := re.search(r"pre_type = LLAMA_VOCAB_PRE_TYPE_(\w+)", line):
            kinds |= dict.fromkeys(pending, kind[1])
            pending = []
    return kinds


def cut(text: str, patterns: list[str]) -> list[str]:
    import regex

    parts = [text]
    for pattern in patterns:
        parts = [piece for part in parts for piece in regex.split(f"({pattern})", part, flags=regex.V0) if piece]
    return parts


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from dsc_serve.text.cuts import CUTS

    text = Path(sys.argv[1]).read_text("utf8")
    meant = {name: kind for name, kind in names(text).items() if name in CUTS}
    patterns = expressions(text)
    cuts = {kind: [cut(text, patterns[kind]) for text in TEXTS] for kind in sorted(set(meant.values()))}
    content = {"version": sys.argv[2], "names": meant, "texts": TEXTS, "cuts": cuts}
    EXPECTED.write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf8")
