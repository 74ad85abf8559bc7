"""Responses for the OpenAPI document, with examples that run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dsc_serve.server.tools.described import SCHEMA, Described

FLAT = {"type": "function", "name": "set_age", "parameters": SCHEMA, "strict": True}
RESPONSE_EXAMPLES: dict[str, dict[str, Any]] = {
    "text": {"input": "Who?", "instructions": "Be brief.", "max_output_tokens": 16},
    "stream": {"input": [{"role": "user", "content": "Who?"}], "max_output_tokens": 4, "stream": True},
    "tool": {"input": "How old?", "tools": [FLAT], "tool_choice": "required", "parallel_tool_calls": False},
    "one of some tools": {
        "input": "How old?",
        "tools": [FLAT, {"type": "function", "name": "set_name"}],
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "set_age"}],
        },
        "parallel_tool_calls": False,
    },
    "log probabilities": {
        "input": "Who?",
        "max_output_tokens": 4,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    },
    "JSON schema": {
        "input": "How old?",
        "text": {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}},
        "max_output_tokens": 40,
    },
}


class InputTokensDetails(Described):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Described):
    reasoning_tokens: int


class ResponseUsage(Described):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(Described):
    code: str | None
    message: str


class Incomplete(Described):
    reason: Literal["max_output_tokens", "timeout"]


class ResponseAnswer(Described):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]] = Field(
        description="items of type message, reasoning and function_call, in their order"
    )
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, None]
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None
    dsc: dict[str, Any] | None = None
