"""The two fields by which a client says what the text must look like: OpenAI's, and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator
from pydantic_core import to_json

from dsc_serve.sampling_params import StructuredOutputs
from dsc_serve.server.errors import bad_request, shown
from dsc_serve.server.fields import Fields, Only

Schema = dict[str, Any]


def check_schema(value: Any) -> Schema | str | None:
    if value is None or isinstance(value, dict | str):
        return value
    param = "structured_outputs.json"
    raise bad_request(param, f"{param} is {shown(value)}; it must be an object or a string", "invalid_type")


SchemaOrText = Annotated[Schema | str | None, PlainValidator(check_schema, json_schema_input_type=Schema | str | None)]


class JsonSchemaFormat(Fields):
    """`strict` may be left out: every output follows the schema."""

    name: str
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Fields):
    """OpenAI's way. `json_schema` belongs to the type of that name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputsFields(Fields):
    """vLLM's way. Exactly one of `json`, `json_object`, `regex`, `choice` and `grammar` must be set.

    grammar: Lark or GBNF. whitespace_pattern: a regex of what may stand between the tokens of JSON.
    """

    json_: Annotated[SchemaOrText, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    structural_tag: Annotated[Any, Only()] = None


def structured_outputs(
    response_format: ResponseFormat | None, fields: StructuredOutputsFields | None
) -> StructuredOutputs | None:
    """Raises ApiError (400) or ParameterError."""
    if response_format is not None and fields is not None and response_format.type != "text":
        message = "structured_outputs is set together with response_format; send one of the two"
        raise bad_request("structured_outputs", message)
    if fields is not None:
        return StructuredOutputs(
            json=schema_text(fields.json_),
            json_object=fields.json_object or False,
            regex=fields.regex,
            choice=tuple(fields.choice or ()),
            grammar=fields.grammar,
            whitespace_pattern=fields.whitespace_pattern,
            disable_any_whitespace=fields.disable_any_whitespace or False,
            disable_additional_properties=fields.disable_additional_properties or False,
        )
    if response_format is None:
        return None
    wanted, param = response_format.json_schema, "response_format.json_schema"
    if wanted is None and response_format.type == "json_schema":
        raise bad_request(param, f"{param} is missing; it is required where type is json_schema")
    if wanted is not None and response_format.type != "json_schema":
        raise bad_request(param, f"{param} is set; it may only be where type is json_schema")
    if wanted is not None:
        return StructuredOutputs(json=schema_text(wanted.schema_))
    return StructuredOutputs(json_object=True) if response_format.type == "json_object" else None


def schema_text(schema: Schema | str | None) -> str | None:
    if schema is None or isinstance(schema, str):
        return schema
    return to_json(schema, inf_nan_mode="constants").decode()
