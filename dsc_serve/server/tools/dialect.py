"""What the served model was taught beyond text: its call form, its marks of reasoning, and how they are constrained."""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec
from pydantic_core import to_json

from dsc_serve.sampling_params import SamplingParams
from dsc_serve.server.tools.fields import Json, Tool, ToolChoice
from dsc_serve.server.tools.parser import CallParser
from dsc_serve.server.tools.reader import AnswerReader
from dsc_serve.server.tools.reasoning import ReasoningParser, reasoning_of
from dsc_serve.server.tools.registry import form_of
from dsc_serve.structured_outputs import CallGrammar, Literals, ReasoningGrammar, StructuredOutputs, ToolGrammar
from dsc_serve.text.tokenizer import Tokenizer

MOST_CALLS = 16  # of a constrained answer, so that it comes to its end
ANY = r"(.|\n)*"
ANY_OBJECT: Json = {"type": "object"}


@dataclass(frozen=True)
class ReaderOptions:
    """What to look for in an answer."""

    choice: ToolChoice
    begun: bool  # it begins within the reasoning


class Dialect:
    """form: of calls. reasoning: its marks; None where the template has none. renders_tools: the template does so."""

    def __init__(self, tokenizer: Tokenizer | None, setting: str) -> None:
        self.form = form_of(setting, tokenizer)
        template = None if tokenizer is None else tokenizer.chat_template
        self.reasoning = None if template is None else reasoning_of(template.source)
        self.renders_tools = template is not None and template.knows_tools
        self._special = {} if tokenizer is None else tokenizer.special_texts
        self._thinking = () if self.reasoning is None else (self.reasoning.opening, self.reasoning.closing)

    def shown(self, choice: ToolChoice) -> frozenset[int]:
        """Special tokens that are read as text, since they say what a part of the answer is."""
        signs = (*self._thinking, *(self.form.signs if choice.tools else ()))
        return frozenset(self._special[sign] for sign in signs if sign in self._special)

    def begun_by(self, prompt: str) -> bool:
        return self.reasoning is not None and self.reasoning.begun_by(prompt)

    def reader(self, reading: ReaderOptions) -> AnswerReader | None:
        """None where an answer is nothing but text."""
        choice = reading.choice
        reasoning = None if self.reasoning is None else ReasoningParser(self.reasoning, reading.begun)
        calls = CallParser(self.form, choice.names, int(choice.single), choice.must) if choice.tools else None
        return None if reasoning is None and calls is None else AnswerReader(reasoning, calls)

    def constrained(self, params: SamplingParams, choice: ToolChoice) -> SamplingParams:
        """The parameters with what the tools ask of the text. Raises ParameterError."""
        answer = params.structured_outputs
        # A call of a tool that is shown and may not be called would be read as text.
        strict = choice.restricted or any(tool.strict for tool in choice.callable)
        if not choice.tools or not (choice.must or strict or answer is not None):
            return params
        free = not choice.must and answer is None
        calls = self._grammar(choice, free)
        if answer is None or choice.must:
            asked = StructuredOutputs(calls=calls)
        else:
            asked = msgspec.structs.replace(answer, calls=calls)
        return msgspec.structs.replace(params, structured_outputs=asked)

    def reasoned(self, params: SamplingParams, begun: bool) -> SamplingParams:
        """The parameters with room for reasoning before what the text must look like."""
        asked = params.structured_outputs
        if asked is None or self.reasoning is None:
            return params
        opening, closing = self._literal(self.reasoning.opening), self._literal(self.reasoning.closing)
        marks = ReasoningGrammar(opening=opening, closing=closing, begun=begun)
        return msgspec.structs.replace(params, structured_outputs=msgspec.structs.replace(asked, reasoning=marks))

    def _grammar(self, choice: ToolChoice, free: bool) -> CallGrammar:
        form = self.form
        skipped = 1 if form.mark == "{" else 0  # of the head, which the mark is then part of
        listed = form.list_start
        return CallGrammar(
            tools=tuple(self._tool(tool, choice.must or tool.strict, skipped) for tool in choice.callable),
            mark=self._literal(form.mark),
            tail=self._literals(form.tail + form.closing),
            start=listed,
            between=", " if listed else "",
            end="]" if listed else "",
            apart=form.apart,
            most=1 if choice.single else MOST_CALLS,
            triggers=self._triggers(skipped) if free else (),
        )

    def _tool(self, tool: Tool, follow: bool, skipped: int) -> ToolGrammar:
        schema = tool.parameters if follow else ANY_OBJECT
        if not schema.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf"}:
            schema = {"type": "object", "properties": {}, **schema}
        head = self._literals(self.form.head_of(tool.name)[skipped:])
        return ToolGrammar(head=head, schema=to_json(schema, inf_nan_mode="constants").decode(), field=tool.field)

    def _triggers(self, skipped: int) -> Literals:
        """After each of these a call's head follows, or a list's start."""
        triggers: list[str | int] = [rf"({ANY}\n)?[ \t]*\{{"] if skipped else []
        brace = r"\s*\{" if skipped else ""
        for mark in self.form.marks:
            literal = self._literal(mark)
            if isinstance(literal, str):
                triggers.append(ANY + re.escape(mark) + brace)
            elif not skipped:
                triggers.append(literal)
        return tuple(triggers)

    def _literal(self, text: str) -> str | int:
        return self._special.get(text, text)

    def _literals(self, text: str) -> Literals:
        """The text with the signs in it that are tokens of their own."""
        signs = [sign for sign in self.form.signs if sign in self._special]
        if not signs:
            return (text,)
        parts = re.split("(" + "|".join(map(re.escape, signs)) + ")", text)
        return tuple(self._literal(part) for part in parts if part)
