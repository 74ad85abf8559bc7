"""The fields of a request. Every field either acts, or may only have the value at which it would do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag

from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import MAX_BIASES, SamplingParams
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.server.errors import bad_request, from_parameter, shown
from dsc_serve.server.extensions import DscFields, SchedulingFields
from dsc_serve.server.fields import MAX_COUNT, Count, Fields, Only
from dsc_serve.server.harmless import HarmlessGenerationFields, Notes
from dsc_serve.server.structured import ResponseFormat, StructuredOutputsFields, structured_outputs
from dsc_serve.server.tools.fields import CallFields, ChoiceField, ToolChoice, Tools, choice_of, tools_of

DEFAULT_MAX_TOKENS = 16  # of completions; a chat goes on to the context's end
TOKEN_ID_DIGITS = 10
MAX_USER = 256  # characters
MAX_MESSAGES = 4096
MAX_SUFFIX = 2**20  # characters

Truncation = Annotated[int, Field(ge=-1, le=MAX_COUNT)]

TextOption = Annotated[str, Tag("(text)")]
Prompt = str | list[int] | list[str] | list[list[int]]


def json_kind(value: object) -> str | None:
    return "(text)" if isinstance(value, str) else "(list)" if isinstance(value, list) else None


TEXT_OR_LIST = Discriminator(
    json_kind, custom_error_type="text_or_list_type", custom_error_message="a string or a list"
)
FIRST_ERROR = Field(fail_fast=True)


def check_prompt(value: Any, param: str = "prompt") -> Prompt:
    """Checks by sets of types: a prompt may hold a million ids. param: the field's name."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        allowed = "a string, a list of token ids, a list of strings or a list of lists of token ids"
        raise bad_request(param, f"{param} is {shown(value)}; it must be {allowed}", "invalid_type")
    kinds = set(map(type, value))
    if kinds <= {int} or kinds == {str}:
        return value
    if kinds == {list}:
        for i, ids in enumerate(value):
            if not set(map(type, ids)) <= {int}:
                j = next(j for j, id in enumerate(ids) if type(id) is not int)
                raise wrong_item(f"{param}.{i}.{j}", ids[j], "a token id (an integer)")
        return value
    first = type(value[0])
    wanted = {int: "a token id (an integer)", str: "a string", list: "a list of token ids"}.get(first)
    if wanted is None:
        raise wrong_item(f"{param}.0", value[0], "a string, a token id or a list of token ids")
    i = next(i for i, item in enumerate(value) if type(item) is not first)
    raise wrong_item(f"{param}.{i}", value[i], f"{wanted}, as {param}.0 is")


def wrong_item(param: str, value: object, allowed: str) -> Exception:
    return bad_request(param, f"{param} is {shown(value)}; it must be {allowed}", "invalid_type")


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        default=None, description="every event tells the usage so far, not only the last one; vLLM's field"
    )
    include_obfuscation: Annotated[Any, Only(False)] = None


class EngineFields(Fields):
    """What every request to the engine has; null means the default.

    `priority`, `queue_timeout_s`, `timeout_s` and `cache_salt` are those of `SchedulingParams`.
    """

    model: str | None = None
    user: Annotated[str, Field(max_length=MAX_USER)] | None = Field(
        default=None,
        description="whom the policy `fair` charges where no API key says it; named in the log where the request fails",
    )
    priority: Count | None = None
    queue_timeout_s: float | None = None
    timeout_s: float | None = None
    cache_salt: str | None = None
    dsc: SchedulingFields | None = None

    @property
    def names(self) -> Mapping[str, str]:
        """What the client calls a field of SamplingParams, where the two differ."""
        return {}

    @property
    def include_usage(self) -> bool:
        return False

    @property
    def continuous_usage(self) -> bool:
        return False

    def scheduling(self, policy: str) -> SchedulingParams:
        """For whom, how urgently and within what time; `policy` is the server's. Raises ApiError (400)."""
        asked = self.dsc or SchedulingFields()
        for field, same in (("priority", "priority"), ("deadline_ms", "timeout_s")):
            if getattr(asked, field) is not None and getattr(self, same) is not None:
                raise bad_request(f"dsc.{field}", f"dsc.{field} is set together with {same}; send one of the two")
        own = {name: getattr(self, name) for name in ("priority", "queue_timeout_s", "timeout_s", "cache_salt")}
        if asked.priority is not None:
            own["priority"] = asked.priority
        if asked.deadline_ms is not None:
            own["timeout_s"] = asked.deadline_ms / 1000
        if own["priority"] and policy != "priority":
            param = "priority" if asked.priority is None else "dsc.priority"
            allowed = f"0 on this server, whose policy is {policy}, not priority"
            raise bad_request(param, f"{param} is {own['priority']}; it must be {allowed}")
        try:
            return SchedulingParams(
                tenant=self.user or "", **{name: value for name, value in own.items() if value is not None}
            )
        except ParameterError as error:
            raise from_parameter(error, {}) from None


class GenerationFields(EngineFields, HarmlessGenerationFields):
    """What both endpoints take. The sampling fields are those of SamplingParams."""

    dsc: DscFields | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_BIASES)] | None = None
    seed: int | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    stop: Annotated[TextOption | Annotated[list[str], FIRST_ERROR, Tag("(list)")], TEXT_OR_LIST] | None = None
    stop_token_ids: Annotated[list[int], FIRST_ERROR] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    n: Count | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsFields | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Truncation | None = Field(
        default=None, description="keep so many of the prompt's last tokens, -1: as many as fit; vLLM's field"
    )

    @property
    def names(self) -> Mapping[str, str]:
        whole = self.dsc is None or self.dsc.top_k_atoms is None
        own = {"routing": "dsc.return_routing" if whole else "dsc.top_k_atoms", "max_drafts": "dsc.max_drafts"}
        if self.response_format is None or self.structured_outputs is not None:
            return own
        return {**own, "structured_outputs": "response_format"}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats is True

    @property
    def limit_name(self) -> str:
        """The field that says how much may be generated; OpenAI has an older name of it and a newer one."""
        return "max_tokens" if getattr(self, "max_completion_tokens", None) is None else "max_completion_tokens"

    @property
    def limit(self) -> int | None:
        """What that field says. Raises ApiError (400) where both are set and differ."""
        field = self.limit_name
        limit: int | None = getattr(self, field)
        if self.max_tokens not in (None, limit):
            raise bad_request(field, f"{field} is {limit} but max_tokens is {self.max_tokens}; send one of the two")
        return limit

    def sampling(self, **own: Any) -> SamplingParams:
        """The parameters for the engine; `own` are those that only this endpoint can tell. Raises ApiError (400)."""
        if self.truncate_prompt_tokens == 0:
            name = "truncate_prompt_tokens"
            raise bad_request(name, f"{name} is 0; it must be at least 1, or -1 for as many as fit")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options", "stream_options is set; it may only be when stream is true")
        if self.continuous_usage and not self.include_usage:
            name = "stream_options.continuous_usage_stats"
            raise bad_request(name, f"{name} is true; it may only be when stream_options.include_usage is true")
        given = {name: value for name in PASSED_ON if (value := getattr(self, name)) is not None}
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids is not None:
            given["stop_token_ids"] = tuple(dict.fromkeys(self.stop_token_ids))
        if self.logit_bias is not None:
            given["logit_bias"] = {token_id_key(key): bias for key, bias in self.logit_bias.items()}
        if self.dsc is not None:
            given["routing"] = self.dsc.routing
            given["max_drafts"] = self.dsc.max_drafts
        try:
            given["structured_outputs"] = structured_outputs(self.response_format, self.structured_outputs)
            return SamplingParams(**(given | own))
        except ParameterError as error:
            raise from_parameter(error, self.names) from None


PASSED_ON = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "min_tokens", "ignore_eos", "skip_special_tokens", "n",
)  # fmt: skip


def token_id_key(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) <= TOKEN_ID_DIGITS and str(int(key)) == key):
        raise bad_request("logit_bias", f'logit_bias has the key {shown(key)}; keys must be token ids, such as "42"')
    return int(key)


class CompletionRequest(GenerationFields):
    prompt: Annotated[Prompt, PlainValidator(check_prompt, json_schema_input_type=Prompt)]
    logprobs: Count | None = None
    echo: bool | None = None
    max_completion_tokens: Count | None = None
    best_of: Annotated[Any, Only(1)] = None
    suffix: Annotated[str, Field(max_length=MAX_SUFFIX)] | None = None
    add_special_tokens: Annotated[Any, Only(True)] = None

    @property
    def names(self) -> Mapping[str, str]:
        return {**super().names, "prompt_logprobs": "logprobs", "max_tokens": self.limit_name}

    def params(self) -> SamplingParams:
        """Raises ApiError (400)."""
        limit, field = self.limit, self.limit_name
        if limit is None:
            limit = DEFAULT_MAX_TOKENS
        if limit == 0 and not self.echo:
            raise bad_request(field, f"{field} is 0; it must be at least 1, or 0 together with echo")
        for other in ("echo", "truncate_prompt_tokens"):
            if self.suffix and getattr(self, other):
                raise bad_request("suffix", f"suffix is set together with {other}; send one of the two")
        prompt_logprobs = self.logprobs if self.echo else None
        return self.sampling(max_tokens=limit, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs)


class TextPart(Fields):
    type: Literal["text"]
    text: str
    cache_control: Notes | None = Field(
        default=None, description="what to keep in a cache, which this server decides itself; Anthropic's field"
    )


Content = Annotated[TextOption | Annotated[list[TextPart], FIRST_ERROR, Tag("(list)")], TEXT_OR_LIST]


def text_of(content: str | list[TextPart], between: str = "\n") -> str:
    return content if isinstance(content, str) else between.join(part.text for part in content)


class Prediction(Fields):
    """A text that much of the answer is expected to be like: it then comes faster, and is the same."""

    type: Literal["content"]
    content: Content

    @property
    def text(self) -> str:
        return text_of(self.content, "")


class Message(Fields):
    """Content may be null, or missing, in an assistant's message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(
        default=None, description="of a tool's message the result of the call of its `tool_call_id`"
    )
    name: Annotated[str, Field(max_length=MAX_USER)] | None = Field(
        default=None, description="whose message it is, where the template shows that"
    )
    cache_control: Notes | None = Field(default=None, description="as in a part")
    refusal: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None
    audio: Annotated[Any, Only()] = None
    tool_calls: Annotated[list[CallFields], FIRST_ERROR] | None = None
    tool_call_id: str | None = Field(default=None, description="of a tool's message")
    reasoning_content: str | None = Field(
        default=None, description="as an answer had it; the template decides what to do with it"
    )
    provider_specific_fields: dict[str, Any] | None = Field(
        default=None, description="LiteLLM's notes for itself, which it sends along with an answer of ours"
    )
    function_call: Annotated[Any, Only()] = None

    @property
    def text(self) -> str:
        return "" if self.content is None else text_of(self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(GenerationFields):
    messages: Messages
    add_generation_prompt: bool | None = Field(
        default=None, description="whether the assistant's answer begins (default: true); vLLM's field"
    )
    continue_final_message: bool | None = Field(
        default=None, description="go on with the last message instead of beginning an answer; vLLM's field"
    )
    chat_template_kwargs: Notes | None = Field(
        default=None,
        description="what the template reads beside the messages, as {'enable_thinking': false} of some; vLLM's field",
    )
    add_special_tokens: Annotated[Any, Only(False)] = None
    echo: Annotated[Any, Only(False)] = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    max_completion_tokens: Count | None = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    functions: Annotated[Any, Only([])] = None
    modalities: Annotated[Any, Only(["text"])] = None
    moderation: Annotated[Any, Only()] = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    tool_choice: ChoiceField = None
    tools: Tools | None = None
    verbosity: Annotated[Any, Only("medium")] = None
    web_search_options: Annotated[Any, Only()] = None

    @property
    def names(self) -> Mapping[str, str]:
        own = {"prompt": "messages", "logprobs": "top_logprobs", "prediction_token_ids": "prediction"}
        return {**super().names, **own, "max_tokens": self.limit_name}

    def choice(self) -> ToolChoice:
        """Raises ApiError (400)."""
        return choice_of(tools_of(self.tools or []), self.tool_choice, self.parallel_tool_calls)

    def params(self) -> SamplingParams:
        """Raises ApiError (400)."""
        limit, field = self.limit, self.limit_name
        if limit is not None and limit < 1:
            raise bad_request(field, f"{field} is {limit}; it must be at least 1")
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs", "top_logprobs is set; it may only be when logprobs is true")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(max_tokens=limit, logprobs=logprobs)
