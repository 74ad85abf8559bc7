"""Errors as the client sees them: one JSON form, that of OpenAI's API, for everything that goes wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dsc_serve.parameter_errors import ContextLengthError, ParameterError

MAX_MESSAGE = 500
MAX_SHOWN = 60
MAX_PARAM = 120
UNION_MEMBERS = ("(text)", "(list)", "(message)", "(call)", "(result)", "(reasoning)")
MAX_DETAILED = 100
PATH = re.compile(r"""(?<=['"])/[^'"\n]*/|(?<![\w/:.~-])/(?:[^\s/'",;:()\[\]]+/)+""")  # up to its last part
CONTEXT_LENGTH = "context_length_exceeded"
CLIENT_CLOSED = 499  # never sent: it is how a request whose client has left is counted


class ApiError(Exception):
    """Ends a request with `status`. `param` names the field to blame, as the client wrote it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
        super().__init__(self.message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def bad_request(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def from_parameter(error: ParameterError, names: Mapping[str, str], code: str = "invalid_value") -> ApiError:
    """`names` maps our fields to what the client calls them where the two differ."""
    message, param = str(error), names.get(error.field, error.field)
    if isinstance(error, ContextLengthError):
        return bad_request(param, error.told(names.get("prompt", "prompt").split(".")[0], param), CONTEXT_LENGTH)
    if message.startswith(error.field):
        message = param + message.removeprefix(error.field)
    return bad_request(param, message, code)


def shown(value: object) -> str:
    """A value for a message: scalars as JSON and cut short, containers by their kind."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = msgspec.json.encode(value[:MAX_SHOWN]).decode() if isinstance(value, str) else str(value)
    text = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def without_paths(text: str) -> str:
    """An inner error's text for a client, to whom the folders of this machine are nothing."""
    return PATH.sub("…/", text)


ALLOWED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "int_type": lambda _: "an integer",
    "float_type": lambda _: "a number",
    "finite_number": lambda _: "a finite number",
    "bool_type": lambda _: "true or false",
    "string_type": lambda _: "a string",
    "list_type": lambda _: "a list",
    "dict_type": lambda _: "an object",
    "model_type": lambda _: "an object",
    "item_type": lambda _: "an item of type message, function_call, function_call_output or reasoning",
    "text_or_list_type": lambda _: "a string or a list",
    "literal_error": lambda context: str(context["expected"]).replace("'", '"'),
    "greater_than": lambda context: f"above {context['gt']}",
    "greater_than_equal": lambda context: f"at least {context['ge']}",
    "less_than_equal": lambda context: f"at most {context['le']}",
    "string_too_long": lambda context: f"a string of at most {context['max_length']} characters",
    "string_pattern_mismatch": lambda context: f"a string of the form {context['pattern']}",
    "too_short": lambda context: f"a list of at least {context['min_length']}",
    "too_long": lambda context: f"one of at most {context['max_length']} entries",
}


def from_validation(error: ValidationError, known: Collection[str]) -> ApiError:
    """The first thing that is wrong with a request body. `known` are the fields of the endpoint."""
    if error.error_count() > MAX_DETAILED:  # listing them costs far more time than finding them
        return bad_request(None, f"the body has {error.error_count()} unknown or wrong fields; /docs lists the fields")
    first = error.errors(include_url=False)[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if kind == "json_invalid":
        return bad_request(None, f"the body is not valid JSON in UTF-8: {context['error']}", "invalid_json")
    if not first["loc"]:
        return bad_request(None, f"the body is {shown(value)}; it must be a JSON object", "invalid_type")
    field, *path = first["loc"]
    # Within a field, parts in parentheses are the names of union members, which the client never wrote.
    param = ".".join([str(field), *(str(part) for part in path if part not in UNION_MEMBERS)])[:MAX_PARAM]
    if kind == "missing":
        return bad_request(param, f"{param} is missing; it is required", "missing_required_parameter")
    if kind == "extra_forbidden":
        close = [] if path else difflib.get_close_matches(param, known, 1)
        hint = f"did you mean {close[0]}?" if close else "/docs lists the fields"
        return bad_request(param, f"{shown(param)} is not a field of this endpoint; {hint}", "unknown_parameter")
    if kind == "unsupported":
        return bad_request(param, f"{param} {first['msg']}", "unsupported_parameter")
    allowed = ALLOWED[kind](context) if kind in ALLOWED else f"different: {first['msg']}"
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return bad_request(param, f"{param} is {shown(value)}; it must be {allowed}", code)


async def answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    route = f"{request.method} {shown(request.scope['path'])[1:-1]}"
    if error.status_code == 404:
        return ApiError(404, f"{route} is not a route of this server; /docs lists them", code="unknown_url").response()
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{route} is not allowed; the method must be {allowed or 'another'}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers).response()
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def answer_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


def internal_error() -> ApiError:
    return ApiError(500, "the server failed on this request; its log has the cause", type="server_error")


def out_of_time(message: str, code: str = "timeout") -> ApiError:
    """Not an error of the server's: the time was the client's own. OpenAI's clients would ask again by themselves."""
    return ApiError(408, message, type="timeout_error", code=code, headers={"x-should-retry": "false"})


def engine_down(message: str) -> ApiError:
    return ApiError(503, without_paths(message) or "the engine is down", type="server_error", code="engine_down")


def install(app: FastAPI) -> None:
    """Every error of `app` leaves in the one form."""
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(ClientDisconnect, answer_disconnect)
