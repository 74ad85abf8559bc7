"""Calls in a text that arrives in pieces, cut anywhere.

The parser goes character by character, so how the text was cut changes nothing. Nothing is called a call before it has
named a tool of the request and begun its arguments; what turns out to be none is text again, to the last character.
From then on it stays a call, however its arguments go on: they are passed on as they come.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from dsc_serve.server.tools.form import CallForm
from dsc_serve.server.tools.objects import Balance, HeldObject, Label, ObjectProgress
from dsc_serve.server.tools.parts import CallArguments, CallStart, Content, Part, joined

SPACE = " \t\n\r"


class CallParser:
    """Parses one answer. names: the tools that it may call. most: calls, after which nothing is read (0: any number).
    must: there is nothing else than calls, so what is cut off before it is one is no text.

    count: calls so far. malformed: those whose arguments ended and are no JSON object. done: there are `most`.
    """

    def __init__(self, form: CallForm, names: Collection[str], most: int = 0, must: bool = False) -> None:
        self._form, self._names, self._most = form, frozenset(names), most
        self._must, self._complete = must, 0
        self._firsts = {mark[0] for mark in form.marks} | ({"{", "\n"} if form.bare else set())
        self.count = self.malformed = 0
        self._parts: list[Part] = []
        self._before = ""  # white space that is dropped before a call
        self._held = ""  # what is not known yet to be text or part of a call
        self._line_start = True
        self._in_list = False
        self._arguments: list[str] = []
        self._balance = Balance()
        self._within = False  # an object that does not end with the arguments
        self._object = HeldObject(self._names)
        self._label = Label(self._names)
        self._state: Callable[[str], None] = self._pausing

    @property
    def done(self) -> bool:
        return 0 < self._most <= self._complete

    @property
    def held(self) -> int:
        """Characters that are not known yet to be text or part of a call."""
        return len(self._before) + len(self._held)

    def push(self, text: str) -> list[Part]:
        """What became certain with this text."""
        i = 0
        while i < len(text) and not self.done:
            if self._state == self._reading and not self._held:
                start = i
                while i < len(text) and text[i] not in self._firsts:
                    i += 1
                if i > start:
                    self._line_start = self._line_start and not text[start:i].strip(" \t")
                    self._parts.append(Content(text[start:i]))
                    continue
            self._state(text[i])
            i += 1
        return self._taken()

    def finish(self) -> list[Part]:
        """What is left at the end of the answer: a call that has begun stays one, anything else held is text."""
        if self._state in (self._arguing, self._closing, self._skipping):
            self._end_arguments()
        elif not self._must and not (self.count and self._state in (self._pausing, self._ending)) and not self.done:
            self._text(self._before + self._held)
        self._held = ""
        return self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return joined(parts)

    def _text(self, text: str) -> None:
        if text:
            self._parts.append(Content(text))

    # Each state takes one character.

    def _pausing(self, char: str) -> None:
        """At the start of the answer, or after a call: white space before a call is no text."""
        more = SPACE + ";," if self._form.bare and self.count else SPACE
        if char in more:
            self._held += char
            self._line_start = True
            return
        self._before, self._held = self._held, ""
        self._begin(char)

    def _begin(self, char: str) -> None:
        """Text or a call."""
        if self._form.bare and char == "{":
            self._open_object(char)
        elif any(mark.startswith(char) for mark in self._form.marks):
            self._held, self._state = char, self._marking
        else:
            self._no_call(char)

    def _reading(self, char: str) -> None:
        """In text."""
        if self._form.bare and self._line_start and char == "{":
            self._before = ""
            self._open_object(char)
        elif any(mark.startswith(char) for mark in self._form.marks):
            self._before, self._held, self._state = "", char, self._marking
        else:
            self._line_start = char == "\n" or (self._line_start and char in " \t")
            self._text(char)

    def _no_call(self, char: str) -> None:
        """What is held is text, and the next character is looked at anew."""
        held, self._held, self._before = self._before + self._held, "", ""
        self._text(held)
        if held:
            self._line_start = not held.rpartition("\n")[2].strip(" \t") and (self._line_start or "\n" in held)
        self._state, self._in_list = self._reading, False
        self._reading(char)

    def _marking(self, char: str) -> None:
        """Within a mark."""
        held = self._held + char
        if held in self._form.marks:
            self._held, self._state = held, self._marked
        elif any(mark.startswith(held) for mark in self._form.marks):
            self._held = held
        else:
            self._no_call(char)

    def _marked(self, char: str) -> None:
        """After a mark, or after a comma of a list."""
        if char in SPACE:
            self._held += char
        elif char == "{":
            self._open_object(char)
        elif char == "[" and self._form.listed and not self._in_list:
            self._held, self._in_list = self._held + char, True
        elif self._form.labelled and not self._in_list and self._label.begin(char):
            self._held, self._state = self._held + char, self._labelling
        else:
            self._no_call(char)

    def _labelling(self, char: str) -> None:
        """Within a tool's name that stands before its arguments."""
        progress = self._label.push(char)
        if progress is ObjectProgress.CALL:
            self._start(self._label.name)
            self._argue(char, within=False)
        elif progress is ObjectProgress.NO:
            self._no_call(char)
        else:
            self._held += char

    def _open_object(self, char: str) -> None:
        self._held, self._state = self._held + char, self._looking
        self._object = HeldObject(self._names)

    def _looking(self, char: str) -> None:
        """Within an object that is not known yet to be a call."""
        progress = self._object.push(char)
        if progress is ObjectProgress.NO:
            self._no_call(char)
        elif progress is ObjectProgress.MORE:
            self._held += char
        elif progress is ObjectProgress.CALL:
            self._start(self._object.name)
            self._argue(char, within=True)
        else:  # the object has ended
            self._held += char
            name, arguments = self._object.call
            if name is None:
                held, self._held, self._before = self._before + self._held, "", ""
                self._text(held)
                self._state, self._in_list, self._line_start = self._reading, False, False
                return
            self._start(name)
            self._parts.append(CallArguments(self.count - 1, arguments))
            self._completed()

    def _start(self, name: str) -> None:
        self._held, self._before, self._arguments = "", "", []
        self._parts.append(CallStart(self.count, self._form.new_id(), name))
        self.count += 1

    def _argue(self, char: str, within: bool) -> None:
        """The arguments begin; within: in an object that does not end with them."""
        self._within, self._balance, self._state = within, Balance(), self._arguing
        self._arguing(char)

    def _arguing(self, char: str) -> None:
        """Within the arguments."""
        self._arguments.append(char)
        self._parts.append(CallArguments(self.count - 1, char))
        if self._balance.push(char):
            self._end_arguments()
            if self._within:
                self._state = self._closing
            else:
                self._completed()

    def _end_arguments(self) -> None:
        text, self._arguments = "".join(self._arguments), []
        if text and not is_object(text):
            self.malformed += 1

    def _closing(self, char: str) -> None:
        """After the arguments, up to the end of the object around them."""
        if char in SPACE:
            self._held += char
        elif char == "}":
            self._completed()
        elif char == ",":
            self._held, self._balance, self._state = "", Balance(1), self._skipping
        else:  # the brace is missing, as models forget it
            held = self._held
            self._completed()
            self._held = held
            if not self.done:
                self._ending(char)

    def _skipping(self, char: str) -> None:
        """What an object says of a call besides its name and arguments."""
        if self._balance.push(char):
            self._completed()

    def _completed(self) -> None:
        """A call is whole, but for what closes it."""
        self._held, self._state = "", self._ending
        self._complete += 1

    def _ending(self, char: str) -> None:
        """After a call's object: what closes it, or goes on with a list."""
        held = self._held + char
        closing = self._form.closing
        if self._in_list and char in SPACE:
            self._held = held
        elif self._in_list and char == ",":
            self._held, self._state = held, self._marked
            self._before = ""
        elif self._in_list and char == "]":
            self._pause("")
        elif closing and not held.strip(SPACE):
            self._held = held
        elif closing and closing.startswith(held.lstrip(SPACE)):
            if held.lstrip(SPACE) == closing:
                self._pause("")
            else:
                self._held = held
        else:
            begun = self._held.lstrip(SPACE)
            if closing and begun:  # it was not what closes the call
                self._no_call(char)
            else:
                self._pause(self._held)
                self._pausing(char)

    def _pause(self, held: str) -> None:
        self._held, self._state, self._in_list, self._line_start = held, self._pausing, False, True


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
