"""Made-up English to try the trainer out on, where no text is at hand."""

from __future__ import annotations

import random

WHO = ("the old sailor", "a young clerk", "the miller", "her sister", "the captain", "my neighbour", "a tired horse")
DID = ("carried", "lost", "repaired", "painted", "found", "sold", "remembered", "hid", "borrowed", "counted")
WHAT = ("a brass lamp", "the long letter", "two wooden boats", "the garden gate", "a basket of apples", "the map")
WHERE = ("near the harbour", "behind the church", "on the hill", "by the river", "in the narrow street", "at home")
WHEN = ("before sunrise", "in the evening", "after the storm", "last winter", "at noon", "on a quiet Sunday")
LINKS = ("Then", "Later", "Of course", "Nobody knew why, but", "That is how")


def sentence(rng: random.Random, linked: bool) -> str:
    words = f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHAT)} {rng.choice(WHERE)} {rng.choice(WHEN)}"
    if linked:
        return f"{rng.choice(LINKS)} {words}."
    return f"{words[0].upper()}{words[1:]}."


def paragraphs(count: int, seed: int = 0) -> str:
    """That many paragraphs of two to five sentences, with blank lines between."""
    rng = random.Random(seed)
    written = (" ".join(sentence(rng, i > 0) for i in range(rng.randint(2, 5))) for _ in range(count))
    return "\n\n".join(written) + "\n"
