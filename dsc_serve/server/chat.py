"""POST /v1/chat/completions: the model's chat template turns the messages into one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import Request
from fastapi.responses import Response

from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.server.answer import Choice, ChoiceUpdate, ResponseFormatter
from dsc_serve.server.errors import bad_request, from_parameter, shown
from dsc_serve.server.limits import read_fields
from dsc_serve.server.logprobs import logprob_entries
from dsc_serve.server.schema import ChatRequest, Message
from dsc_serve.server.service import Service
from dsc_serve.server.stream import Generation
from dsc_serve.server.tools.dialect import ReaderOptions
from dsc_serve.server.tools.fields import Tool, ToolChoice
from dsc_serve.server.tools.messages import Known, arguments_of, call_of, for_template
from dsc_serve.server.tools.parts import CallArguments, CallStart, Content, Part, Reasoning
from dsc_serve.text.broken_template import BrokenTemplate
from dsc_serve.text.chat import ChatTemplate, ChatTemplateError

END = uuid4().hex  # marks the end of a message that is gone on with, while it is rendered


class ChatFormatter(ResponseFormatter):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def whole(self, choice: Choice, update: ChoiceUpdate) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", **message_of(choice, update), "refusal": None},
            "logprobs": self._logprobs(choice, update),
            "finish_reason": finish_reason(choice, update),
            "stop_reason": update.stop_reason,
            **self.extension(choice, update),
        }

    def pieces(self, choice: Choice, update: ChoiceUpdate) -> list[dict[str, Any]]:
        """The role comes first, alone; the reason of the end comes last, alone."""
        pieces = []
        if not choice.begun:
            choice.begun = True
            pieces.append(piece(choice, {"role": "assistant", "content": "", "refusal": None}))
        deltas = [delta_of(part) for part in update.parts]
        text, logprobs = "".join(update.text), self._logprobs(choice, update)
        if text or (update.logprobs and not deltas):
            deltas = [{"content": text}]
        pieces += [piece(choice, delta, None if i else logprobs) for i, delta in enumerate(deltas)]
        if update.finish_reason is not None:
            last = piece(choice, {}, finish_reason=finish_reason(choice, update))
            pieces.append({**last, "stop_reason": update.stop_reason})
        if pieces:
            pieces[-1].update(self.extension(choice, update))
        return pieces

    def _logprobs(self, choice: Choice, update: ChoiceUpdate) -> dict[str, Any] | None:
        if choice.params.logprobs is None:
            return None
        return {"content": logprob_entries(self.service, update.logprobs), "refusal": None}


def message_of(choice: Choice, update: ChoiceUpdate) -> dict[str, Any]:
    """The fields of an answer that say what is in it. The content is null beside calls without any text."""
    if choice.reader is None:
        return {"content": "".join(update.text)}
    texts: dict[type[Part], str] = {Content: "", Reasoning: ""}
    calls: list[dict[str, Any]] = []
    for part in update.parts:
        if isinstance(part, CallStart):
            calls.append(call_of(part.id, part.name, ""))
        elif isinstance(part, CallArguments):
            calls[part.index]["function"]["arguments"] += part.text
        else:
            texts[type(part)] += part.text
    message: dict[str, Any] = {"content": texts[Content] or (None if calls else "")}
    if texts[Reasoning]:
        message["reasoning_content"] = texts[Reasoning]
    return {**message, "tool_calls": calls} if calls else message


def delta_of(part: Part) -> dict[str, Any]:
    if isinstance(part, Content):
        return {"content": part.text}
    if isinstance(part, Reasoning):
        return {"reasoning_content": part.text}
    if isinstance(part, CallStart):
        return {"tool_calls": [{"index": part.index, **call_of(part.id, part.name, "")}]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}


def finish_reason(choice: Choice, update: ChoiceUpdate) -> str | None:
    called = choice.reader is not None and choice.reader.calls
    return "tool_calls" if called and update.finish_reason == "stop" else update.openai_reason


def piece(
    choice: Choice, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


async def rendered(
    service: Service,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool = True,
    low_priority: bool = False,
    continue_final: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The messages as the one text that the model reads, for `Service.encode`; low_priority: as there.

    continue_final: it ends with the last message, which is gone on with. variables: what the template gets beside
    them (chat_template_kwargs). Raises ApiError (400).
    """
    return await rendered_messages(
        *(service, checked(messages), tools, add_generation_prompt, low_priority),
        continue_final=continue_final,
        variables=variables,
    )


async def rendered_messages(
    service: Service,
    messages: Sequence[Known],
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool = True,
    low_priority: bool = False,
    param: str = "messages",
    continue_final: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """As `rendered`, of messages as templates know them; `param` is what the client calls them."""
    template = service.chat_template
    if template is None:
        what = "tokenizer" if service.tokenizer is None else "chat template"
        raise bad_request(param, f"{param} cannot be used: this model has no {what}; use /v1/completions")
    check_variables(template, variables or {})
    own = service.spelling.hidden(dict(variables or {}))
    known, offered = service.spelling.hidden(for_template(messages, tools, service.dialect))
    if continue_final:
        if known[-1].get("tool_calls"):
            field = "continue_final_message"
            raise bad_request(field, f"{field} is true; it may not be where the last message has tool_calls")
        known = [*known[:-1], {**known[-1], "content": f"{known[-1]['content']}{END}"}]
    begins = add_generation_prompt and not continue_final
    try:
        text = await service.rendered(lambda: template.render(known, begins, offered, own), low_priority)
    except ChatTemplateError as error:
        said = service.spelling.shown(str(error)).replace(END, "")
        raise bad_request(param, f"{param} cannot be used: {said}") from None
    return ending_with_last(text) if continue_final else text


def check_variables(template: ChatTemplate, variables: Mapping[str, Any]) -> None:
    """Raises ApiError (400) for one that the template does not read, or that a request says elsewhere."""
    for name in variables:
        if name not in template.variables and not isinstance(template, BrokenTemplate):
            field, read = f"chat_template_kwargs.{name}", ", ".join(sorted(template.variables)) or "none"
            what = "is not supported: the model's chat template does not read it, or a field of its own says it"
            raise bad_request(field, f"{field} {what}; allowed: {read}", "unsupported_parameter")


def check_continuation(continue_final: bool | None, add_generation_prompt: bool | None) -> None:
    """Raises ApiError (400) where an answer is to begin, and the last message to go on."""
    if continue_final and add_generation_prompt:
        name = "continue_final_message"
        raise bad_request(name, f"{name} and add_generation_prompt are both true; send one of the two")


def ending_with_last(text: str) -> str:
    """A rendered text up to the end of the last message. Raises ApiError (400)."""
    before, found, _ = text.rpartition(END)
    if not found:
        what = "this model's chat template does not show the last message as it is"
        raise bad_request("continue_final_message", f"continue_final_message cannot be used: {what}")
    return before


def checked(messages: Sequence[Message]) -> list[Known]:
    """The messages as templates know them. Raises ApiError (400) where a field is in a message of the wrong role, or a
    result is of no call before it.
    """
    called: dict[str, str] = {}
    known: list[Known] = []
    for i, message in enumerate(messages):
        field, role = f"messages.{i}", message.role
        for name, owner in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
            if getattr(message, name) and role != owner:
                raise bad_request(f"{field}.{name}", f"{field}.{name} is set; it may only be where role is {owner}")
        if message.content is None and role != "assistant":
            raise bad_request(f"{field}.content", f"{field}.content is missing; it is required where role is {role}")
        # `developer` is the newer name of `system`; templates know the older one.
        made: Known = {"role": "system" if role == "developer" else role, "content": message.text}
        if message.name is not None:
            made["name"] = message.name
        if message.reasoning_content:
            made["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            called |= {call.id: call.function.name for call in message.tool_calls}
            made["tool_calls"] = [
                call_of(call.id, call.function.name, arguments_of(call.function.arguments))
                for call in message.tool_calls
            ]
        if role == "tool":
            of = message.tool_call_id
            if of is None or of not in called:
                what = "is missing" if of is None else f"is {shown(of)}"
                allowed = "it must be the id of a call in an earlier message of the assistant"
                raise bad_request(f"{field}.tool_call_id", f"{field}.tool_call_id {what}; {allowed}")
            made |= {"tool_call_id": of, "name": called[of]}
        known.append(made)
    return known


async def create_chat_completion(service: Service, request: Request) -> Response:
    """Raises ApiError; nothing has been queued then."""
    fields = await read_fields(request, ChatRequest)
    resolved = await service.resolve(request, fields.model, fields.dsc)
    check_continuation(fields.continue_final_message, fields.add_generation_prompt)
    choice = fields.choice()
    params, names = constrained(service, fields.params(), choice, fields.names)
    limit_s = fields.scheduling(service.engine.model.policy).timeout_s
    await service.grammars.check(request, params, names, limit_s)  # which may take long, so without a place
    service.admit(request, params.n, "n")
    text = await rendered(
        *(service, fields.messages, choice.tools),
        add_generation_prompt=fields.add_generation_prompt is not False,
        continue_final=fields.continue_final_message is True,
        variables=fields.chat_template_kwargs,
    )
    prompt = await service.tokens(text, "messages", params, fields.truncate_prompt_tokens, chat=True)
    if fields.prediction is not None:
        predicted = await service.encode(fields.prediction.text, "prediction", chat=True)
        params = msgspec.structs.replace(params, prediction_token_ids=tuple(predicted))
    params, reading = begin(service, service.apply_limits(prompt, params, names), choice, text)
    formatter = ChatFormatter(service, f"chatcmpl-{uuid4().hex}", fields, resolved)
    formatter.names = names
    choices = formatter.choices(prompt, params, reading=reading)
    return Generation(service, formatter, choices, prompt_tokens=len(prompt), stream=bool(fields.stream))


def constrained(
    service: Service, params: SamplingParams, choice: ToolChoice, names: Mapping[str, str]
) -> tuple[SamplingParams, Mapping[str, str]]:
    """The parameters with what the tools ask of the answer, and what the client calls their fields."""
    if choice.tools and params.structured_outputs is None:
        names = {**names, "structured_outputs": "tools"}
    try:
        return service.dialect.constrained(params, choice), names
    except ParameterError as error:
        raise from_parameter(error, names) from None


def begin(
    service: Service, params: SamplingParams, choice: ToolChoice, prompt: str
) -> tuple[SamplingParams, ReaderOptions]:
    """For an answer to this prompt: the parameters with room for reasoning, and what to look for in it."""
    begun = service.dialect.begun_by(prompt)
    return service.dialect.reasoned(params, begun), ReaderOptions(choice, begun)
