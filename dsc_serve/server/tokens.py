"""POST /tokenize and /detokenize: text to token ids and back, as a generation would see them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import Field, PlainValidator

from dsc_serve.parameter_errors import ContextLengthError
from dsc_serve.server.chat import check_continuation, rendered
from dsc_serve.server.errors import bad_request, from_parameter, json_response
from dsc_serve.server.fields import Fields
from dsc_serve.server.harmless import Notes
from dsc_serve.server.limits import read_fields
from dsc_serve.server.schema import Messages, wrong_item
from dsc_serve.server.service import Service
from dsc_serve.server.tools.fields import Tools, tools_of


class TokenizeRequest(Fields):
    """Either `prompt`, or the `messages` of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = Field(default=None, description="of a chat, as its request would have them")
    add_special_tokens: bool | None = Field(
        default=None,
        description=(
            "what the tokenizer adds to a prompt; by default for a prompt and not for a chat, whose template writes "
            "its own"
        ),
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="of a chat, whether the assistant's answer begins (default: true)"
    )
    continue_final_message: bool | None = Field(default=None, description="as of a chat")
    chat_template_kwargs: Notes | None = Field(default=None, description="as of a chat")
    return_token_strs: bool | None = Field(default=None, description="tell each token's text")


def check_tokens(value: Any) -> list[int]:
    """Checks by a set of types: there may be a million ids."""
    if not isinstance(value, list):
        raise bad_request("tokens", "tokens must be a list of token ids", "invalid_type")
    if not set(map(type, value)) <= {int}:
        i = next(i for i, id in enumerate(value) if type(id) is not int)
        raise wrong_item(f"tokens.{i}", value[i], "a token id (an integer)")
    return value


class DetokenizeRequest(Fields):
    model: str | None = None
    return_token_strs: bool | None = Field(default=None, description="tell each token's text too")
    tokens: Annotated[list[int], PlainValidator(check_tokens, json_schema_input_type=list[int])]


async def tokenize(service: Service, request: Request) -> Response:
    """Raises ApiError."""
    fields = await read_fields(request, TokenizeRequest)
    await service.resolve(request, fields.model)
    if (fields.prompt is None) is (fields.messages is None):
        raise bad_request("prompt", "prompt and messages are both set or both missing; send one of the two")
    text, param = fields.prompt or "", "prompt"
    if fields.messages is not None:
        param = "messages"
        tools = tools_of(fields.tools or [])
        check_continuation(fields.continue_final_message, fields.add_generation_prompt)
        text = await rendered(
            *(service, fields.messages, tools, fields.add_generation_prompt is not False),
            low_priority=True,
            continue_final=fields.continue_final_message is True,
            variables=fields.chat_template_kwargs,
        )
    else:
        for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(fields, name) not in (None, [], {}):
                raise bad_request(name, f"{name} is set; it may only be with messages")
    special = fields.messages is None if fields.add_special_tokens is None else fields.add_special_tokens
    ids = await service.encode(text, param, chat=not special, low_priority=True)
    names = None
    if fields.return_token_strs:
        names = await service.run_low_priority(lambda: [service.token_name(id) for id in ids])
    return json_response(
        {
            "count": len(ids),
            "max_model_len": service.engine.model.capacity.max_tokens,
            "tokens": ids,
            "token_strs": names,
        }
    )


async def detokenize(service: Service, request: Request) -> Response:
    """Special tokens are part of the text. Raises ApiError."""
    fields = await read_fields(request, DetokenizeRequest)
    await service.resolve(request, fields.model)
    tokenizer, ids, capacity = service.tokenizer, fields.tokens, service.engine.model.capacity
    if tokenizer is None:
        raise bad_request("tokens", "tokens cannot be used: this model has no tokenizer")
    if len(ids) > capacity.max_tokens:
        error = ContextLengthError("tokens", "", capacity.max_tokens, len(ids))
        raise from_parameter(error, {"prompt": "tokens"})
    for i, id in enumerate(ids):
        if not 0 <= id < capacity.vocab_size:
            raise bad_request(f"tokens.{i}", f"tokens.{i} is {id}; allowed: 0 to {capacity.vocab_size - 1}")
    text = await service.run_low_priority(lambda: tokenizer.decode(ids, skip_special_tokens=False))
    if not fields.return_token_strs:
        return json_response({"prompt": text})
    names = await service.run_low_priority(lambda: [service.token_name(id) for id in ids])
    return json_response({"prompt": text, "token_strs": names})
