"""Parameters that cannot be used, as errors that name the field."""

from __future__ import annotations

from typing import NoReturn


class ParameterError(ValueError):
    """A value that cannot be used. `field` names it, as the caller wrote it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class ContextLengthError(ParameterError):
    """A prompt, or it and what may be generated, that is longer than what there is room for.

    limit: tokens that there is room for; note: why so many. completion: None where only the prompt is too long.
    """

    def __init__(
        self, field: str, message: str, limit: int, prompt: int, completion: int | None = None, note: str = ""
    ) -> None:
        super().__init__(field, message)
        self.limit, self.prompt, self.completion, self.note = limit, prompt, completion, note

    def told(self, what: str, limit_name: str) -> str:
        """In OpenAI's words, by which clients know that a shorter prompt, or a model with a longer context, would do.

        what: what the client calls the prompt; limit_name: and `max_tokens`.
        """
        has = f"This model's maximum context length is {self.limit} tokens{self.note}. However, "
        if self.completion is None:
            return f"{has}your {what} resulted in {self.prompt} tokens. Please reduce the length of the {what}."
        parts = f"{self.prompt} in the {what}, {self.completion} in the completion"
        whole = f"{has}you requested {self.prompt + self.completion} tokens ({parts})."
        whole += f" Please reduce the length of the {what} or completion."
        if self.field != "max_tokens":
            return whole
        return f"{whole} {limit_name} may be at most {self.limit - self.prompt}, together with the {what} {self.limit}."


def reject(field: str, value: object, allowed: str) -> NoReturn:
    raise ParameterError(field, f"{field} is {value!r}; it must be {allowed}")
