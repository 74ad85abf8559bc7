"""Whether an object, or a name before an object, becomes a call: told as early as can be."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import Enum

from dsc_serve.server.tools.form import ARGUMENT_KEYS

SPACE = " \t\n\r"
OTHER_KEYS = ("id", "type")  # that some models write first
KEYS = ("name", *ARGUMENT_KEYS, *OTHER_KEYS)
LABEL = re.compile(r"(?:\[CALL_ID\][A-Za-z0-9_-]*)?(?:\[ARGS\])?\s*")
LONGEST_LABEL = 160  # characters


class ObjectProgress(Enum):
    """MORE: it is open. CALL: the arguments begin with this character. ENDED: the object is complete."""

    MORE = 0
    CALL = 1
    ENDED = 2
    NO = 3


class Balance:
    """Finds the end of an object or a list. depth: of what is open already."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_text, self._escaped = depth, False, False

    def push(self, char: str) -> bool:
        """Whether it ends with this character."""
        if self._in_text:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_text = False
        elif char == '"':
            self._in_text = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth <= 0
        return False


class Label:
    """A tool's name, possibly with marks behind it, before an object."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._text = self.name = ""

    def begin(self, char: str) -> bool:
        self._text = self.name = ""
        return self.push(char) is ObjectProgress.MORE

    def push(self, char: str) -> ObjectProgress:
        if char == "{":
            for name in self._names:
                if self._text.startswith(name) and LABEL.fullmatch(self._text, len(name)):
                    self.name = name
                    return ObjectProgress.CALL
            return ObjectProgress.NO
        self._text += char
        possible = len(self._text) <= LONGEST_LABEL and any(self._fits(name) for name in self._names)
        return ObjectProgress.MORE if possible else ObjectProgress.NO

    def _fits(self, name: str) -> bool:
        if name.startswith(self._text):
            return True
        rest = self._text[len(name) :]
        return self._text.startswith(name) and (rest[0] in "[" + SPACE)


class HeldObject:
    """An object that has begun with its brace.

    name: of the tool, once `push` has said CALL. call: after ENDED, the tool's name (None: it is no call) and its
    arguments as JSON.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._stage = self._before_key
        self._key = ""
        self.name = ""
        self._text = "{"
        self._balance: Balance | None = None

    def push(self, char: str) -> ObjectProgress:
        self._text += char
        if self._balance is not None:
            return ObjectProgress.ENDED if self._balance.push(char) else ObjectProgress.MORE
        return self._stage(char)

    @property
    def call(self) -> tuple[str | None, str]:
        try:
            value = json.loads(self._text)
        except (ValueError, RecursionError):
            return None, ""
        name = value.get("name")
        if not isinstance(name, str) or name not in self._names:
            return None, ""
        if not (value.keys() <= {"name", *OTHER_KEYS} or value.keys() & set(ARGUMENT_KEYS)):
            return None, ""
        given: object = next((value[key] for key in ARGUMENT_KEYS if key in value), {})
        if isinstance(given, str):
            try:
                given = json.loads(given) if given.strip() else {}
            except (ValueError, RecursionError):
                return None, ""
        if given is None:
            given = {}
        return (name, json.dumps(given, ensure_ascii=False)) if isinstance(given, dict) else (None, "")

    def _hold(self) -> ObjectProgress:
        """What comes is looked at when the object has ended."""
        self._balance = Balance()
        ended = [self._balance.push(char) for char in self._text]
        return ObjectProgress.ENDED if ended[-1] else ObjectProgress.MORE

    def _before_key(self, char: str) -> ObjectProgress:
        if char in SPACE:
            return ObjectProgress.MORE
        self._key, self._stage = "", self._in_key
        return ObjectProgress.MORE if char == '"' else ObjectProgress.NO

    def _in_key(self, char: str) -> ObjectProgress:
        if char != '"':
            self._key += char
            wanted = any(key.startswith(self._key) for key in KEYS)
            if wanted or self.name:
                return ObjectProgress.MORE
            return ObjectProgress.NO
        if self._key not in KEYS and not self.name:
            return ObjectProgress.NO
        if self._key == ("name" if not self.name else self._key) and (not self.name or self._key in ARGUMENT_KEYS):
            self._stage = self._before_colon
            return ObjectProgress.MORE
        return self._hold()

    def _before_colon(self, char: str) -> ObjectProgress:
        if char in SPACE:
            return ObjectProgress.MORE
        self._stage = self._before_arguments if self.name else self._before_name
        return ObjectProgress.MORE if char == ":" else ObjectProgress.NO

    def _before_name(self, char: str) -> ObjectProgress:
        if char in SPACE:
            return ObjectProgress.MORE
        self._key, self._stage = "", self._in_name
        return ObjectProgress.MORE if char == '"' else ObjectProgress.NO

    def _in_name(self, char: str) -> ObjectProgress:
        if char != '"':
            self._key += char
            return ObjectProgress.MORE if any(name.startswith(self._key) for name in self._names) else ObjectProgress.NO
        if self._key not in self._names:
            return ObjectProgress.NO
        self.name, self._stage = self._key, self._after_name
        return ObjectProgress.MORE

    def _after_name(self, char: str) -> ObjectProgress:
        if char in SPACE:
            return ObjectProgress.MORE
        self._stage = self._before_key
        return ObjectProgress.MORE if char == "," else ObjectProgress.ENDED if char == "}" else ObjectProgress.NO

    def _before_arguments(self, char: str) -> ObjectProgress:
        if char in SPACE:
            return ObjectProgress.MORE
        return ObjectProgress.CALL if char == "{" else self._hold()
