"""POST /v1/completions: go on with a text or with token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import Request
from fastapi.responses import Response

from dsc_serve.sampling_params import SamplingParams
from dsc_serve.server.answer import Choice, ChoiceUpdate, ResponseFormatter
from dsc_serve.server.limits import read_fields
from dsc_serve.server.logprobs import LOWEST_LOGPROB
from dsc_serve.server.schema import DEFAULT_MAX_TOKENS, CompletionRequest, Prompt
from dsc_serve.server.service import Service
from dsc_serve.server.stream import Generation
from dsc_serve.text.detokenize import IncrementalDetokenizer
from dsc_serve.text.tokenizer import Tokenizer
from dsc_serve.worker.messages import TokenLogprobs


class CompletionFormatter(ResponseFormatter):
    kind = chunk_kind = "text_completion"

    def whole(self, choice: Choice, update: ChoiceUpdate) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "index": choice.index,
            "text": "".join(update.text),
            "logprobs": None if choice.params.logprobs is None else self._logprobs(choice, update.logprobs),
            "finish_reason": update.openai_reason,
            "stop_reason": update.stop_reason,
            **self.extension(choice, update),
        }
        if self.service.tokenizer is None:
            entry["token_ids"] = update.token_ids
        return entry

    def pieces(self, choice: Choice, update: ChoiceUpdate) -> list[dict[str, Any]]:
        return [self.whole(choice, update)]

    def _logprobs(self, choice: Choice, entries: list[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """Parallel lists over tokens. `text_offset` counts characters from the start of the choice's text."""
        name = self.service.token_name
        tokens: list[str] = []
        chosen: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in entries:
            token_id = choice.prompt[0] if entry is None else entry.token_id
            token = name(token_id)
            tokens.append(token)
            if choice.echo is not None and choice.told == len(choice.prompt):
                choice.characters = len(choice.echo)  # the prompt as it was sent, which its tokens need not spell
            offsets.append(self._advance(choice, token_id))
            choice.told += 1
            if entry is None:
                chosen.append(None)
                top.append(None)
                continue
            logprob = max(entry.logprob, LOWEST_LOGPROB)
            chosen.append(logprob)
            alternatives: dict[str, float] = {}
            for other, value in entry.top:  # the likeliest first; of tokens with one text it is the one that counts
                alternatives.setdefault(name(other), max(value, LOWEST_LOGPROB))
            alternatives.setdefault(token, logprob)
            top.append(alternatives)
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}

    def _advance(self, choice: Choice, token_id: int) -> int:
        """Where the token begins in the choice's text; a token that begins within a character begins where it does."""
        tokenizer, start = self.service.tokenizer, choice.characters
        if tokenizer is None:
            return start
        if not tokenizer.visible(token_id, choice.params.skip_special_tokens):
            mark = tokenizer.token_text(token_id)
            if choice.echo is not None and choice.told < len(choice.prompt) and choice.echo.startswith(mark, start):
                choice.characters += len(mark)  # the client's own text names it
            return start
        leading = choice.echo is not None and start == 0
        piece = tokenizer.leading_bytes(token_id) if leading else tokenizer.token_bytes(token_id)
        choice.characters += sum(not within_character(byte) for byte in piece)
        return start - 1 if start and piece and within_character(piece[0]) else start


def within_character(byte: int) -> bool:
    """Whether a byte of UTF-8 continues a character."""
    return byte & 0xC0 == 0x80


def count_of(prompt: Prompt) -> int:
    """Prompts that there are. `schema.check_prompt` has seen to it that a list holds one kind."""
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def one_by_one(prompt: Prompt, param: str = "prompt") -> dict[str, str | list[int]]:
    """The prompts by what the client calls them, who calls the field so."""
    if isinstance(prompt, str):
        return {param: prompt}
    items: Sequence[int | str | list[int]] = prompt
    ids = [item for item in items if isinstance(item, int)]
    if ids or not items:
        return {param: ids}
    return {f"{param}.{i}": item for i, item in enumerate(items) if not isinstance(item, int)}


def echoed(tokenizer: Tokenizer | None, prompt: str | list[int], params: SamplingParams) -> str:
    """The prompt as text, ending where the generated text begins."""
    if isinstance(prompt, str) or tokenizer is None:
        return prompt if isinstance(prompt, str) else ""
    return IncrementalDetokenizer(tokenizer, [], params.skip_special_tokens).push(prompt)


async def create_completion(service: Service, request: Request) -> Response:
    """Raises ApiError; nothing has been queued then."""
    fields = await read_fields(request, CompletionRequest)
    resolved = await service.resolve(request, fields.model, fields.dsc)
    params = fields.params()
    count = count_of(fields.prompt)
    limit_s = fields.scheduling(service.engine.model.policy).timeout_s
    await service.grammars.check(request, params, fields.names, limit_s)  # which may take long, so without a place
    service.admit(request, count * params.n, "prompt" if count > 1 else "n")
    prompts = one_by_one(fields.prompt)
    formatter = CompletionFormatter(service, f"cmpl-{uuid4().hex}", fields, resolved)
    choices: list[Choice] = []
    prompt_tokens = 0
    context, most = service.engine.model.capacity.max_tokens, service.limits.max_output_tokens or DEFAULT_MAX_TOKENS
    for name, prompt in prompts.items():
        if choices:
            await asyncio.sleep(0)  # many prompts take a while: let the tokens of other requests pass
        own, cut = params, fields.truncate_prompt_tokens
        if fields.suffix:
            ids = await service.filled(prompt, name, fields.suffix)
            ids = await service.tokens(ids, name, own, cut)
        else:
            ids = await service.tokens(prompt, name, own, cut)
        if fields.limit is None and min(most, context - len(ids)) < DEFAULT_MAX_TOKENS:
            own = msgspec.structs.replace(params, max_tokens=None)  # a default must not refuse what fits without it
        own = service.apply_limits(ids, own, {**fields.names, "prompt": name})
        echo = echoed(service.tokenizer, prompt if cut is None else ids, params) if fields.echo else None
        choices += formatter.choices(ids, own, len(choices), echo)
        prompt_tokens += len(ids)
    return Generation(service, formatter, choices, prompt_tokens=prompt_tokens, stream=bool(fields.stream))
