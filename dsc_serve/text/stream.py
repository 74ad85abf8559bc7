"""The text of one generation as its tokens arrive: detokenising and stop strings together."""

from __future__ import annotations

from collections.abc import Sequence, Set

from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.text.detokenize import IncrementalDetokenizer
from dsc_serve.text.stop import StopMatcher
from dsc_serve.text.tokenizer import Tokenizer


class TextStream:
    """Turns one generation's tokens into text and ends it at a stop string.

    Stop strings are looked for in the text produced after the first `params.min_tokens` tokens. Without a tokenizer
    tokens are counted, the text stays empty, and stop strings cannot be used (raises ParameterError).

    shown: special tokens whose text is part of it although others' is not.
    stopped: a stop string was found. kept_tokens: the generated tokens, up to and including the one that completed the
    stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        params: SamplingParams,
        shown: Set[int] = frozenset(),
    ) -> None:
        if tokenizer is None and params.stop:
            raise ParameterError("stop", f"stop is {params.stop!r}; this model has no tokenizer, so it must be empty")
        self._detokenizer = (
            None if tokenizer is None else IncrementalDetokenizer(tokenizer, prompt, params.skip_special_tokens, shown)
        )
        self._matcher = StopMatcher(params.stop)
        self._min_tokens = params.min_tokens
        self.kept_tokens: list[int] = []

    @property
    def stopped(self) -> bool:
        return self._matcher.found is not None

    @property
    def stop_text(self) -> str | None:
        """The stop string that was found."""
        return self._matcher.found

    @property
    def token_count(self) -> int:
        return len(self.kept_tokens)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text to show after these tokens; none for tokens that come after a stop string."""
        text = ""
        for token_id in token_ids:
            if self.stopped:
                break
            self.kept_tokens.append(token_id)
            if self._detokenizer is not None:
                new = self._detokenizer.push((token_id,))
                text += self._matcher.push(new) if self.token_count > self._min_tokens else new
        return text

    def finish(self) -> str:
        """The text still held back, at the end of the generation; none when called again or after a stop string."""
        if self.stopped or self._detokenizer is None:
            return ""
        rest = self._detokenizer.flush()
        text = self._matcher.push(rest) if self.token_count > self._min_tokens else rest
        return text + self._matcher.flush()
