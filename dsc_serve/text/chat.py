"""Chat templates: a list of messages to the one text that the model was trained to read."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsc_serve.documents import DocumentError, read_document
from dsc_serve.text.renderer import Renderer, RendererError
from dsc_serve.text.sandbox import Message, names_in, syntax_fault, variables_in
from dsc_serve.text.sandbox import one_line as one_line

TEMPLATE_FILE = "chat_template.jinja"
MOST_TEMPLATE = 2**20  # bytes; the longest of the field has 2**14


class ChatTemplateError(ValueError):
    """A chat template that is broken or that refuses the messages; one line."""


class ChatTemplate:
    """A chat template. Messages are dicts with at least `role` and `content`.

    template: jinja2 source. special_tokens: names such as "bos_token" to their text, readable in the template.
    It is rendered by processes of its own, as many as there are threads that render at once; they are started when
    they are needed, and end with this object.
    source: the template itself. knows_tools: whether it says anything of tools that it is given. variables: names that
    it reads beside what every chat has, such as enable_thinking.
    Raises ChatTemplateError when the template's syntax is wrong.
    """

    source, knows_tools = "", False
    variables: frozenset[str] = frozenset()

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        if len(template) > MOST_TEMPLATE:
            what = f"chat_template has {len(template)} characters"
            raise ChatTemplateError(f"{what}; at most {MOST_TEMPLATE} are allowed")
        if wrong := syntax_fault(template):
            raise ChatTemplateError(wrong)
        self.source, self._special_tokens = template, dict(special_tokens)
        self.knows_tools = "tools" in names_in(template)
        self.variables = variables_in(template) - special_tokens.keys()
        self._idle: list[Renderer] = []
        weakref.finalize(self, close_all, self._idle)

    def check(self) -> None:
        """Raises ChatTemplateError when the template does not compile, in time and memory that are bounded."""
        self._started().close()

    def warm(self) -> None:
        """Have a process ready, so that the first text does not wait for it. Raises ChatTemplateError."""
        self._idle.append(self._started())

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Message] = (),
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The text to encode, ending where the assistant's answer begins if `add_generation_prompt`.

        Takes seconds at most, so servers call it in a thread. Raises ChatTemplateError when the template refuses the
        messages, cannot handle them, or takes too much time or memory for them; OSError when no process can be started,
        which is nobody's messages' fault.
        """
        renderer = self._taken()
        try:
            text = renderer.render(messages, add_generation_prompt, tools, variables)
        except RendererError as error:
            if error.fatal:
                renderer.close()
            else:
                self._idle.append(renderer)
            raise ChatTemplateError(str(error)) from None
        except BaseException:
            renderer.close()
            raise
        self._idle.append(renderer)
        return text

    def _taken(self) -> Renderer:
        """One that nobody else has."""
        with contextlib.suppress(IndexError):
            while True:
                renderer = self._idle.pop()  # atomic: there are other threads
                if renderer.alive:
                    return renderer
                renderer.close()
        return self._started()

    def _started(self) -> Renderer:
        try:
            return Renderer(self.source, self._special_tokens)
        except RendererError as error:
            raise ChatTemplateError(str(error)) from None


def close_all(renderers: list[Renderer]) -> None:
    while renderers:
        renderers.pop().close()


def default_template(value: object) -> str | None:
    """The template to use of `chat_template` in tokenizer_config.json: a string, or a list of {name, template}.

    Raises ChatTemplateError when it is neither, or when no entry of the list is named "default".
    """
    if value is None or isinstance(value, str):
        return value
    entries: dict[str, object] = {}
    if isinstance(value, dict):
        entries = value
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        entries = {str(entry.get("name")): entry.get("template") for entry in value}
    template = entries.get("default")
    if isinstance(template, str):
        return template
    raise ChatTemplateError(
        f"chat_template has entries named {sorted(entries)}; it must be a text or have one named 'default'"
        if entries
        else f"chat_template is of type {type(value).__name__}; it must be a text or a list of {{name, template}}"
    )


def load_chat_template(
    folder: Path, config: Mapping[str, object], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The folder's chat template: chat_template.jinja, else `chat_template` of its tokenizer_config.json, else None.

    Raises ChatTemplateError.
    """
    path = folder / TEMPLATE_FILE
    try:
        in_file = path.exists()
        template = read_document(path, MOST_TEMPLATE) if in_file else default_template(config.get("chat_template"))
    except (OSError, DocumentError) as error:
        raise ChatTemplateError(f"{TEMPLATE_FILE} cannot be read: {one_line(error)}") from error
    return None if template is None else ChatTemplate(template, special_tokens)
