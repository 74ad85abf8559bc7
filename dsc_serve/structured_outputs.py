"""What a generated text must look like: a schema, a grammar, calls of tools."""

from __future__ import annotations

import msgspec

from dsc_serve.parameter_errors import ParameterError

MAX_GRAMMAR = 2**15  # characters; compiling a JSON schema takes time by the square of its size
MAX_CHOICE_TEXT = 2**17  # characters of all choices; they become one automaton

Literals = tuple[str | int, ...]  # texts, and tokens that are no text


class ToolGrammar(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that may be called."""

    head: Literals  # what stands before its arguments
    schema: str  # theirs, as JSON
    field: str  # what an error of it names


class CallGrammar(msgspec.Struct, frozen=True, kw_only=True):
    """Calls of tools, at most `most`; at least one, unless other text is allowed."""

    tools: tuple[ToolGrammar, ...]
    mark: str | int  # a call begins with it, where no other text is allowed
    tail: Literals = ()  # what stands behind its arguments
    start: str = ""  # a list of calls stands between this …
    between: str = ""  # with this between two; without a list each call begins anew
    end: str = ""  # … and this
    apart: str = ""  # after this
    most: int = 1
    # Other text is allowed, until one of these regexes ends, or one of these tokens comes: then a call follows, without
    # its mark
    triggers: Literals = ()


class ReasoningGrammar(msgspec.Struct, frozen=True, kw_only=True):
    """Reasoning that may stand before a text, in which nothing is constrained."""

    opening: str | int
    closing: str | int
    begun: bool  # the prompt has its opening


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """What the generated text must look like; exactly one of the first five says it."""

    json: str | None = None  # a JSON schema, as text
    json_object: bool = False  # any JSON object
    # What the whole text matches, in Rust's syntax, which has no look-around and no back-references
    regex: str | None = None
    choice: tuple[str, ...] = ()  # one of these texts
    grammar: str | None = None  # a context-free grammar in Lark's or GBNF's syntax, that begins with `start` or `root`
    # A regex of what may stand between the tokens of JSON (default: a space behind each comma and colon, and nothing
    # else)
    whitespace_pattern: str | None = None
    # True lets nothing stand there, False a space, or a line break and an indent of up to 20
    disable_any_whitespace: bool | None = None
    # Objects whose schema names properties have no others, unless it says so itself
    disable_additional_properties: bool = False
    calls: CallGrammar | None = None  # calls of tools, instead of any of the five, or as an alternative to it
    reasoning: ReasoningGrammar | None = None  # what may stand before all that

    def __post_init__(self) -> None:
        field = "structured_outputs"
        texts = {name: getattr(self, name) for name in ("json", "regex", "grammar", "whitespace_pattern")}
        for name, text in texts.items():
            if text is not None and not isinstance(text, str):
                raise ParameterError(field, f"{field}.{name} is {text!r}; it must be a text")
            if text == "":
                raise ParameterError(field, f"{field}.{name} is empty")
        if not isinstance(self.choice, tuple) or not all(isinstance(text, str) and text for text in self.choice):
            raise ParameterError(field, f"{field}.choice is {self.choice!r}; it must be texts, none of them empty")
        set_ = [name for name in ("json", "json_object", "regex", "choice", "grammar") if getattr(self, name)]
        if len(set_) != 1 and (set_ or self.calls is None):
            got = " and ".join(set_) or "none"
            raise ParameterError(
                field, f"{field} has {got} of json, json_object, regex, choice and grammar; it must have exactly one"
            )
        if (self.whitespace_pattern or self.disable_any_whitespace) and set_[:1] not in (["json"], ["json_object"]):
            raise ParameterError(
                field, f"{field} has white space settings together with {''.join(set_) or 'calls'}; they are for JSON"
            )
        if self.disable_additional_properties and set_ != ["json"]:
            raise ParameterError(
                field,
                f"{field} has disable_additional_properties together with {''.join(set_) or 'calls'}; it is for json",
            )
        if self.whitespace_pattern and self.disable_any_whitespace:
            raise ParameterError(field, f"{field} has both whitespace_pattern and disable_any_whitespace; send one")
        schemas = () if self.calls is None else (tool.schema for tool in self.calls.tools)
        size = sum(len(text) for text in (*texts.values(), *self.choice, *schemas) if text)
        most = MAX_CHOICE_TEXT if self.choice else MAX_GRAMMAR
        if size > most:
            raise ParameterError(field, f"{field} has {size} characters; it may have at most {most}")
