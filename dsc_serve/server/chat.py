"""POST /v1/chat/completions: the model's chat template turns the messages into one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import Request
from fastapi.responses import Response

from dsc_serve.server.answer import LOWEST_LOGPROB, Choice, ChoiceUpdate, ResponseFormatter
from dsc_serve.server.errors import bad_request
from dsc_serve.server.limits import read_fields
from dsc_serve.server.schema import ChatRequest, Message
from dsc_serve.server.service import Service
from dsc_serve.server.stream import Generation
from dsc_serve.text.chat import ChatTemplateError
from dsc_serve.worker.messages import TokenLogprobs


class ChatFormatter(ResponseFormatter):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def whole(self, choice: Choice, update: ChoiceUpdate) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(update.text), "refusal": None},
            "logprobs": self._logprobs(choice, update),
            "finish_reason": update.finish_reason,
            **self.extension(choice, update),
        }

    def pieces(self, choice: Choice, update: ChoiceUpdate) -> list[dict[str, Any]]:
        """The role comes first, alone; the reason of the end comes last, alone."""
        pieces = []
        if not choice.begun:
            choice.begun = True
            pieces.append(piece(choice, {"role": "assistant", "content": "", "refusal": None}))
        text, logprobs = "".join(update.text), self._logprobs(choice, update)
        if text or update.logprobs:
            pieces.append(piece(choice, {"content": text}, logprobs))
        if update.finish_reason is not None:
            pieces.append(piece(choice, {}, finish_reason=update.finish_reason))
        if pieces:
            pieces[-1].update(self.extension(choice, update))
        return pieces

    def _logprobs(self, choice: Choice, update: ChoiceUpdate) -> dict[str, Any] | None:
        if choice.params.logprobs is None:
            return None
        content = [
            {
                **self._token(entry.token_id, entry.logprob),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in update.logprobs
            if isinstance(entry, TokenLogprobs)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        tokenizer = self.service.tokenizer
        return {
            "token": self.service.token_name(token_id),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token_id)),
        }


def piece(
    choice: Choice, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


async def rendered(
    service: Service, messages: Sequence[Message], add_generation_prompt: bool = True, low_priority: bool = False
) -> str:
    """The messages as the one text that the model reads; aside: as in `Service.encode`. Raises ApiError (400)."""
    template = service.chat_template
    if template is None:
        what = "tokenizer" if service.tokenizer is None else "chat template"
        raise bad_request("messages", f"messages cannot be used: this model has no {what}; use /v1/completions")
    # `developer` is the newer name of `system`; templates know the older one.
    known: list[dict[str, object]] = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in messages
    ]
    try:
        return await service.rendered(lambda: template.render(known, add_generation_prompt), low_priority)
    except ChatTemplateError as error:
        raise bad_request("messages", f"messages cannot be used: {error}") from None


async def create_chat_completion(service: Service, request: Request) -> Response:
    """Raises ApiError; nothing has been queued then."""
    fields = await read_fields(request, ChatRequest)
    service.check_model(fields.model)
    params = fields.params()
    await service.grammars.check(request, params, fields.names)  # which may take long, so without a place
    service.admit(request, params.n, "n")
    prompt = await service.encode(await rendered(service, fields.messages), "messages", chat=True)
    if fields.prediction is not None:
        predicted = await service.encode(fields.prediction.text, "prediction", chat=True)
        params = msgspec.structs.replace(params, prediction_token_ids=tuple(predicted))
    params = service.apply_limits(prompt, params, fields.names)
    formatter = ChatFormatter(service, f"chatcmpl-{uuid4().hex}", fields)
    choices = formatter.choices(prompt, params)
    return Generation(service, formatter, choices, prompt_tokens=len(prompt), stream=bool(fields.stream))
