"""What stands for a chat template that cannot be used: only chats need one, so only they fail."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from dsc_serve.text.chat import ChatTemplate, ChatTemplateError

log = logging.getLogger(__name__)


class BrokenTemplate(ChatTemplate):
    """fault: what is wrong with the template, in one line."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def render(
        self, messages: object, add_generation_prompt: bool = True, tools: object = (), variables: object = None
    ) -> str:
        """Raises ChatTemplateError."""
        raise ChatTemplateError(f"this model's chat template is broken: {self.fault}")

    def check(self) -> None:
        """Nothing: it is known."""

    def warm(self) -> None:
        """Nothing: it is never rendered."""


def usable(source: Path, load: Callable[[], ChatTemplate | None]) -> ChatTemplate | None:
    """The template that `load` gives; a BrokenTemplate where it raises ChatTemplateError, with a warning."""
    try:
        return load()
    except ChatTemplateError as error:
        log.warning("%s: chats cannot be served: %s", source, error)
        return BrokenTemplate(str(error))


def checked(source: Path, template: ChatTemplate) -> ChatTemplate:
    """The template, once it has been compiled; a BrokenTemplate where that fails, with a warning."""

    def compiled() -> ChatTemplate:
        template.check()
        return template

    return usable(source, compiled) or template
