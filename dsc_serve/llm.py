"""The engine in this process, for scripts and tests."""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from types import TracebackType
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from dsc_serve.adapter_choice import AdapterArgument, AdapterArguments, AdapterChoice, choice_of, choices_of
from dsc_serve.config import EMBEDDED_MODEL, EngineConfig, resolve_model
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.output import Delta, RoutingSlice, TokenLogprobs
from dsc_serve.engine.request import Collect
from dsc_serve.engine.start import start_engine
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import EMBEDDED, EmbeddingParams, SamplingParams, check_embedding, resolve_max_tokens
from dsc_serve.text.stream import TextStream
from dsc_serve.text.tokenizer import Tokenizer

Prompt = str | list[int]


@dataclass
class RequestOutput:
    """One generation."""

    prompt_token_ids: list[int]
    text: str = ""  # without the stop string that ended it
    token_ids: list[int] = field(default_factory=list)  # the generated ones
    finish_reason: str | None = None  # stop (end of text, stop token or string), length, or error: `GenerationError`
    logprobs: list[TokenLogprobs] | None = None  # one for each token, where asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # None for the first, which nothing precedes
    routing: RoutingSlice | None = None  # what all tokens but the last picked, prompt and output, where asked for
    index: int = 0  # which of n choices this is


class GenerationError(RuntimeError):
    """Some requests failed. outputs: what there is of all of them, in order; a failed one has finish_reason "error"."""

    def __init__(self, message: str, outputs: list[RequestOutput]) -> None:
        super().__init__(message)
        self.outputs = outputs


def signature() -> inspect.Signature:
    """Of `LLM`, for help() and editors: the engine's settings with their defaults, the first three also by position."""
    first = ("model", "device", "dtype")
    defaults = {name: getattr(EngineConfig(), name) for name in EngineConfig.kinds()}
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    names = (*first, *(name for name in defaults if name not in first))
    return inspect.Signature([inspect.Parameter(n, kinds[n not in first], default=defaults[n]) for n in names])


class LLM:
    """A model and its engine. `LLM()` is the embedded model.

    model: a folder of this server's or of Hugging Face's form or a GGUF file, converted while it is loaded, or an
    embedded model's name. device: "cpu" or "cuda". dtype: "auto" (as stored, float16 and what is quantised as bfloat16,
    where the device is fast in it), "float32" or "bfloat16": what is computed in, not what weights are held in, which
    the setting `weights` says. settings: further ones of `EngineConfig`, by name, such as
    context, the most tokens of a prompt and its output (0: as many as the model is for); threads and kernels are the
    process's, so the last LLM made decides them for all. Where calls take an `adapter`, it is the name of one in the
    folder `adapters`, several with weights as {name: weight}, an `AdapterChoice`, or None: the model as it is.
    Raises ConfigError, CheckpointError and TokenizerError in one line, TypeError for a name that is no setting.
    """

    __signature__ = signature()

    def __init__(
        self,
        model: str = EMBEDDED_MODEL,
        device: Literal["cpu", "cuda"] = "cpu",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        **settings: Any,
    ) -> None:
        for name in settings:
            if name not in EngineConfig.kinds():
                close = difflib.get_close_matches(name, EngineConfig.kinds(), 1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(EngineConfig.kinds())}"
                raise TypeError(f"{name} is not a setting of the engine; {hint}")
        paths = {name: str(value) for name, value in settings.items() if isinstance(value, PurePath)}
        config = EngineConfig(model=str(model), device=device, dtype=dtype, **{**settings, **paths})
        self.tokenizer = Tokenizer.load(resolve_model(config.model))
        self._engine: Engine | None = start_engine(config)[0]
        self._ids = itertools.count()
        self._tracks: dict[str, _Track] = {}

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: AdapterArguments = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Generate for texts or token-id lists; returns one output per prompt and choice, in order.

        params, adapter: one for all or one per prompt. Raises ParameterError before anything runs when a request
        cannot, and GenerationError once all have ended when one of them failed.
        """
        listed = self._listed(prompts)
        each, adapters = self._each(params, len(listed)), choices_of(adapter, len(listed))
        self.engine.arrivals.check(adapters, self._step)
        with tqdm(total=len(listed), disable=not progress, unit="prompt") as bar:
            tracks: list[_Track] = []
            try:
                for prompt, own, choice in zip(listed, each, adapters, strict=True):
                    tracks += self._submit(prompt, own, choice)
                running = {track.id for track in tracks}
                while running:
                    running.difference_update(self._step())
                    bar.update((len(tracks) - len(running)) * len(listed) // len(tracks) - bar.n)
            finally:
                self._drop(tracks)
        outputs = [track.output for track in tracks]
        failed = [track for track in tracks if track.error]
        if failed:
            raise GenerationError(f"{len(failed)} of {len(tracks)} failed, the first for: {failed[0].error}", outputs)
        return outputs

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: AdapterArgument | None = None
    ) -> Iterator[RequestOutput]:
        """Generate for one prompt and yield, per step, what is new: text, token_ids and at last the finish_reason.

        Raises ParameterError at once, RuntimeError when a step fails.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise ParameterError("n", f"n is {params.n}; a stream has one choice")
        (ids,) = self._listed([prompt])
        resolve_max_tokens(ids, params, self.engine.capacity)
        TextStream(self.tokenizer, ids, params)
        self.engine.check(params)
        choice = choice_of(adapter)
        self.engine.arrivals.check([choice], self._step)
        return self._follow(ids, params, choice)

    def _follow(self, ids: list[int], params: SamplingParams, adapter: AdapterChoice | None) -> Iterator[RequestOutput]:
        """Submits when first asked for an item, so that a stream that nobody reads leaves nothing in the engine."""
        (track,) = self._submit(ids, params, adapter)
        news: deque[RequestOutput] = deque()
        track.news = news
        try:
            while True:
                while news:
                    yield news.popleft()
                track.check()
                if track.output.finish_reason is not None:
                    return
                self._step()
        finally:
            self._drop([track])

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, dimensions: int | None = None, adapter: AdapterArguments = None
    ) -> Tensor:
        """The vectors of texts or token-id lists: float32 [prompts, d], or [prompts, dimensions].

        How hidden states become a vector is the setting `pooling`; dimensions: only so many first components,
        normalised again. Raises ParameterError before anything runs when a prompt or `dimensions` cannot be used.
        """
        asked = EmbeddingParams(dimensions=dimensions)
        check_embedding(asked, self.engine.capacity)
        listed = self._listed(prompts)
        for ids in listed:
            resolve_max_tokens(ids, EMBEDDED, self.engine.capacity)
        adapters = choices_of(adapter, len(listed))
        self.engine.arrivals.check(adapters, self._step)
        tracks: list[_Track] = []
        try:
            for ids, choice in zip(listed, adapters, strict=True):
                tracks.append(self._track(ids, EMBEDDED, 0))
                self.engine.add(tracks[-1].id, ids, EMBEDDED, embedding=asked, adapter=choice)
            while any(track.output.finish_reason is None for track in tracks):
                self._step()
                for track in tracks:
                    track.check()
        finally:
            self._drop(tracks)
        size = dimensions or self.engine.capacity.hidden_size
        vectors = np.frombuffer(b"".join(track.embedding for track in tracks), "<f4")
        return torch.from_numpy(vectors.astype(np.float32).reshape(len(tracks), size))

    def logits(self, token_ids: Sequence[list[int]], *, adapter: AdapterArguments = None) -> list[Tensor]:
        """float32 logits [T, vocabulary] of each token-id list, by the engine's own steps over its paged cache."""
        listed = self._listed(token_ids)
        return self._collected(listed, [lambda start, logits: logits] * len(listed), adapter)

    def losses(self, token_ids: Sequence[list[int]], *, adapter: AdapterArguments = None) -> list[Tensor]:
        """−log probability in nats, float64 [T − 1], of each token after the first of a list under those before it.

        Lists may be one token longer than the context. Of the logits only some rows exist at a time.
        """
        windows = self._listed(token_ids)
        size = self.engine.capacity.vocab_size
        for i, window in enumerate(windows):
            if window and not 0 <= window[-1] < size:  # which no prompt will hold
                raise ParameterError("token_ids", f"token_ids[{i}] ends with {window[-1]}; allowed: 0 to {size - 1}")

        def collect_for(window: list[int]) -> Collect:
            def losses(start: int, logits: Tensor) -> Tensor:
                targets = torch.tensor(window[start + 1 : start + 1 + len(logits)], device=logits.device)
                return cross_entropy(logits.double(), targets, reduction="none")

            return losses

        prompts = [window[:-1] for window in windows]
        return self._collected(prompts, [collect_for(window) for window in windows], adapter)

    def _collected(
        self, prompts: Sequence[list[int]], collects: Sequence[Collect], adapter: AdapterArguments
    ) -> list[Tensor]:
        """What is kept of each prompt's logits, rows in order."""
        params, adapters = SamplingParams(temperature=0, max_tokens=0), choices_of(adapter, len(prompts))
        self.engine.arrivals.check(adapters, self._step)
        tracks: list[_Track] = []
        requests = []
        try:
            for ids, collect, choice in zip(prompts, collects, adapters, strict=True):
                track = self._track(ids, params, 0)
                tracks.append(track)
                requests.append(self.engine.add(track.id, ids, params, collect, adapter=choice))
            while any(track.output.finish_reason is None for track in tracks):
                self._step()
                for track in tracks:
                    track.check()
        finally:
            self._drop(tracks)
        return [torch.cat(request.collected).cpu() for request in requests]

    def close(self) -> None:
        """Release the model and its KV pool. Safe to call twice."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listed(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt. Raises ParameterError naming the one that is neither a text nor token ids."""
        self.engine  # noqa: B018  a closed LLM takes nothing, not even an empty list
        if not isinstance(prompts, str | list | tuple):
            raise ParameterError("prompts", f"prompts is {prompts!r}; expected texts or lists of token ids")
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many = cast(Sequence[Prompt], [prompts] if one else prompts)
        listed = []
        for i, prompt in enumerate(many):
            if not isinstance(prompt, str):
                if not isinstance(prompt, list | tuple) or not all(type(token) is int for token in prompt):
                    raise ParameterError(
                        "prompts", f"prompts[{i}] is {prompt!r}; expected a text or a list of token ids"
                    )
                listed.append(list(prompt))
            elif self.tokenizer is None:
                raise ParameterError("prompt", "prompt is a text, but the model has no tokenizer; give token ids")
            else:
                listed.append(self.tokenizer.encode(prompt))
        return listed

    def _each(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
        if params is None:
            params = SamplingParams()
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, list | tuple) or not all(isinstance(own, SamplingParams) for own in params):
            raise ParameterError("params", f"params is {params!r}; expected SamplingParams, one or one per prompt")
        if len(params) != count:
            raise ParameterError("params", f"params has {len(params)} entries for {count} prompts")
        return params

    def _submit(self, prompt: list[int], params: SamplingParams, adapter: AdapterChoice | None) -> list[_Track]:
        """The choices of one prompt."""
        each = [params.for_choice(i) for i in range(params.n)]
        self.engine.check(each[0])
        tracks = [self._track(prompt, own, i) for i, own in enumerate(each)]
        first, *others = ((track.id, own) for track, own in zip(tracks, each, strict=True))
        try:
            self.engine.add(first[0], prompt, first[1], siblings=others, adapter=adapter)
        except ValueError:
            self._drop(tracks)
            raise
        return tracks

    def _track(self, prompt: list[int], params: SamplingParams, choice: int) -> _Track:
        text = TextStream(self.tokenizer, prompt, params)
        track = _Track(f"llm-{next(self._ids)}", prompt, params, text, choice)
        self._tracks[track.id] = track
        return track

    def _step(self) -> list[str]:
        """One step for everything in flight, whichever call of this LLM it belongs to; the ids of what ended."""
        ended = []
        if not self.engine.has_work:
            self.engine.arrivals.wait()
        for delta in self.engine.step():
            track = self._tracks.get(delta.request_id)
            if track is not None:
                track.take(delta, self.engine)
                if track.output.finish_reason is not None:
                    ended.append(track.id)
        return ended

    def _drop(self, tracks: Sequence[_Track]) -> None:
        for track in tracks:
            self._tracks.pop(track.id, None)
            if self._engine is not None:
                self._engine.finish(track.id)


class _Track:
    """Collects one request's deltas into its output, and keeps what is new where `news` is made for a stream."""

    def __init__(
        self, request_id: str, prompt: list[int], params: SamplingParams, text: TextStream, index: int
    ) -> None:
        self.id, self.text = request_id, text
        self.news: deque[RequestOutput] | None = None
        self.error = ""
        self.embedding = b""
        self.output = RequestOutput(
            prompt_token_ids=prompt,
            index=index,
            logprobs=None if params.logprobs is None else [],
            prompt_logprobs=None if params.prompt_logprobs is None else [],
        )

    def check(self) -> None:
        """Raises RuntimeError when the step that computed this request failed."""
        if self.error:
            raise RuntimeError(self.error)

    def take(self, delta: Delta, engine: Engine) -> None:
        """Add a delta. A failure is kept for the call that owns this request; others step it too."""
        if delta.finish_reason == "error":
            self.error, self.output.finish_reason = delta.error, "error"
            return
        self.embedding = delta.embedding or b""
        before = self.text.token_count
        text = self.text.push(delta.token_ids)
        kept = self.text.token_count - before  # none after a stop string
        new = RequestOutput(
            prompt_token_ids=self.output.prompt_token_ids,
            text=text,
            token_ids=delta.token_ids[:kept],
            finish_reason=delta.finish_reason,
            logprobs=None if delta.logprobs is None else delta.logprobs[:kept],
            prompt_logprobs=delta.prompt_logprobs,
            routing=delta.routing,
            index=self.output.index,
        )
        if self.text.stopped:
            engine.finish(self.id)
            new.finish_reason = "stop"
            if new.routing is not None:  # of the token that completed the stop string nothing is told
                new.routing = new.routing.before(len(new.prompt_token_ids) + self.text.token_count - 1)
        elif new.finish_reason is not None:
            new.text += self.text.finish()
            if self.text.stopped:
                new.finish_reason = "stop"
        self.output.text += new.text
        self.output.token_ids += new.token_ids
        self.output.finish_reason = new.finish_reason
        if self.output.logprobs is not None and new.logprobs:
            self.output.logprobs += new.logprobs
        if self.output.prompt_logprobs is not None and new.prompt_logprobs:
            self.output.prompt_logprobs += new.prompt_logprobs
        if new.routing is not None:
            parts = [new.routing] if self.output.routing is None else [self.output.routing, new.routing]
            self.output.routing = RoutingSlice.joined(parts)
        if self.news is not None:
            self.news.append(new)
