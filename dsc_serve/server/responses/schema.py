"""The fields of /v1/responses. As everywhere, a field acts, or has the one value at which it does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag
from pydantic_core import to_json

from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.server.errors import bad_request, from_parameter, shown
from dsc_serve.server.fields import Count, Fields, Only
from dsc_serve.server.harmless import Notes
from dsc_serve.server.schema import FIRST_ERROR, MAX_MESSAGES, TEXT_OR_LIST, EngineFields, TextOption
from dsc_serve.server.tools.fields import (
    FLAT,
    MAX_TOOLS,
    NAME,
    FlatChoiceField,
    Json,
    Tool,
    ToolChoice,
    check_tools,
    choice_of,
)
from dsc_serve.structured_outputs import StructuredOutputs

Included = Literal[
    "message.output_text.logprobs",
    # of items that no answer and no input has here
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]
LOGPROBS: Included = "message.output_text.logprobs"
MAX_METADATA, MAX_METADATA_TEXT = 16, 512
Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Fields):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Field(
        default=None, description="as an answer had them; they say nothing to the model"
    )
    logprobs: list[Any] | None = Field(default=None, description="as an answer had them; they say nothing to the model")


Text = Annotated[TextOption | Annotated[list[InputText], FIRST_ERROR, Tag("(list)")], TEXT_OR_LIST]


class Item(Fields):
    id: str | None = Field(default=None, description="as an answer had it; nothing is looked up by it")
    status: Status | None = Field(default=None, description="as an answer had it")


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class ResultItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Text


class ReasoningText(Fields):
    type: Literal["reasoning_text"]
    text: str


class SummaryText(Fields):
    type: Literal["summary_text"]
    text: str


class ReasoningItem(Item):
    """Earlier reasoning, for the template to do with as it likes; a summary is not shown to the model."""

    type: Literal["reasoning"]
    summary: list[SummaryText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: Annotated[Any, Only()] = None


ITEMS = {
    "message": "(message)",
    "function_call": "(call)",
    "function_call_output": "(result)",
    "reasoning": "(reasoning)",
}


def item_kind(value: object) -> str | None:
    return ITEMS.get(str(value.get("type", "message"))) if isinstance(value, dict) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("(message)")]
    | Annotated[CallItem, Tag("(call)")]
    | Annotated[ResultItem, Tag("(result)")]
    | Annotated[ReasoningItem, Tag("(reasoning)")],
    Discriminator(
        item_kind,
        custom_error_type="item_type",
        custom_error_message="an item of type message, function_call, function_call_output or reasoning",
    ),
]
Input = Annotated[
    TextOption
    | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), Tag("(list)")],
    TEXT_OR_LIST,
]


class FunctionTool(Fields):
    """As in chats, but flat."""

    type: Literal["function"]
    name: NAME
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class TextFormat(Fields):
    """`name`, `schema` and `strict` belong to json_schema, which every output follows."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextFields(Fields):
    format: TextFormat | None = None
    verbosity: Annotated[Any, Only("medium")] = None


class ReasoningFields(Fields):
    """A model reasons as it was taught to."""

    effort: Annotated[Any, Only("none")] = None
    summary: Annotated[Any, Only()] = None
    generate_summary: Annotated[Any, Only()] = None


class ResponseStreamOptions(Fields):
    include_obfuscation: Annotated[Any, Only(False)] = None


def check_previous(value: Any) -> None:
    """Raises ApiError (400) unless it is null."""
    if value is not None:
        param = "previous_response_id"
        reason = "this server keeps no answers: send the earlier items in input"
        raise bad_request(param, f"{param} is {shown(value)}; {reason}", "unsupported_parameter")


class ResponsesRequest(EngineFields):
    input: Input
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    seed: int | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: FlatChoiceField = None
    parallel_tool_calls: bool | None = None
    text: TextFields | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=MAX_METADATA_TEXT)],
            ],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = None
    store: bool | None = Field(default=None, description="whatever it says, nothing is kept; the answer says so")
    previous_response_id: Annotated[Any, PlainValidator(check_previous, json_schema_input_type=None)] = None
    reasoning: ReasoningFields | None = None
    background: Annotated[Any, Only(False)] = None
    conversation: Annotated[Any, Only()] = None
    context_management: Annotated[Any, Only([])] = None
    include: Annotated[list[Included], FIRST_ERROR] | None = None
    max_tool_calls: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    prompt: Annotated[Any, Only()] = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Annotated[Any, Only()] = None
    prompt_cache_retention: Annotated[Any, Only()] = None
    safety_identifier: str | None = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    top_logprobs: Count | None = None
    chat_template_kwargs: Notes | None = Field(default=None, description="as of a chat")

    @property
    def names(self) -> Mapping[str, str]:
        own = {"prompt": "input", "max_tokens": "max_output_tokens", "structured_outputs": "text.format"}
        return {**own, "logprobs": "top_logprobs"}

    def choice(self) -> ToolChoice:
        """Raises ApiError (400)."""
        tools = tuple(
            Tool(
                tool.name,
                tool.description or "",
                tool.parameters or {},
                tool.strict is True,
                f"tools.{i}.parameters",
            )
            for i, tool in enumerate(self.tools or [])
        )
        check_tools(tools)
        return choice_of(tools, self.tool_choice, self.parallel_tool_calls, FLAT)

    def params(self) -> SamplingParams:
        """Raises ApiError (400)."""
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise bad_request(
                "max_output_tokens", f"max_output_tokens is {self.max_output_tokens}; it must be at least 1"
            )
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options", "stream_options is set; it may only be when stream is true")
        reporting = LOGPROBS in (self.include or [])
        if self.top_logprobs and not reporting:
            what = f'it may only be when include has "{LOGPROBS}"'
            raise bad_request("top_logprobs", f"top_logprobs is set; {what}")
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "seed")
            if (value := getattr(self, name)) is not None
        }
        if reporting:
            given["logprobs"] = self.top_logprobs or 0
        try:
            return SamplingParams(**given, max_tokens=self.max_output_tokens, structured_outputs=self._form())
        except ParameterError as error:
            raise from_parameter(error, self.names) from None

    def _form(self) -> StructuredOutputs | None:
        form, param = None if self.text is None else self.text.format, "text.format"
        if form is None or form.type == "text":
            wanted = None
        elif form.type == "json_object":
            wanted = StructuredOutputs(json_object=True)
        else:
            for name, value in (("name", form.name), ("schema", form.schema_)):
                if value is None:
                    raise bad_request(
                        f"{param}.{name}", f"{param}.{name} is missing; it is required where type is json_schema"
                    )
            return StructuredOutputs(json=to_json(form.schema_, inf_nan_mode="constants").decode())
        if form is not None and form.schema_ is not None:
            raise bad_request(f"{param}.schema", f"{param}.schema is set; it may only be where type is json_schema")
        return wanted

    @property
    def shown_choice(self) -> object:
        return FLAT.written(self.tool_choice)
