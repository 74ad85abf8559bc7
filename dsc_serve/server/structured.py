"""The two fields by which a client says what the text must look like: OpenAI's, and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator
from pydantic_core import to_json

from dsc_serve.server.errors import bad_request, shown
from dsc_serve.server.fields import Fields, Only
from dsc_serve.structured_outputs import StructuredOutputs

Schema = dict[str, Any]


def check_schema(value: Any) -> Schema | str | None:
    if value is None or isinstance(value, dict | str):
        return value
    param = "structured_outputs.json"
    raise bad_request(param, f"{param} is {shown(value)}; it must be an object or a string", "invalid_type")


SchemaOrText = Annotated[Schema | str | None, PlainValidator(check_schema, json_schema_input_type=Schema | str | None)]


def check_value(value: Any) -> Schema | str | None:
    if value is None or isinstance(value, dict | str):
        return value
    param = "response_format.value"
    raise bad_request(param, f"{param} is {shown(value)}; it must be an object or a string", "invalid_type")


class JsonSchemaFormat(Fields):
    """`strict` may be left out: every output follows the schema."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Fields):
    """OpenAI's way, where `json_schema` belongs to the type of that name.

    Clients of other servers put the schema elsewhere: llama.cpp's into `schema`, also of a json_object, and those of
    text-generation-inference into `value`, also of the types json and regex. name, description and strict are then as
    in `json_schema`.
    """

    type: Literal["text", "json_object", "json_schema", "json", "regex"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    value: Annotated[Schema | str | None, PlainValidator(check_value, json_schema_input_type=Schema | str | None)] = (
        None
    )
    name: str | None = None
    description: str | None = None
    strict: bool | None = None

    @property
    def places(self) -> dict[str, object]:
        """Where something says what the text must look like."""
        found = {"json_schema": self.json_schema, "schema": self.schema_, "value": self.value}
        return {name: value for name, value in found.items() if value is not None}


class StructuredOutputsFields(Fields):
    """vLLM's way. Exactly one of `json`, `json_object`, `regex`, `choice` and `grammar` must be set."""

    json_: Annotated[SchemaOrText, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(default=None, description="Lark or GBNF")
    whitespace_pattern: str | None = Field(
        default=None, description="a regex of what may stand between the tokens of JSON, by default nothing"
    )
    disable_any_whitespace: bool | None = Field(default=None, description="false lets white space stand there")
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
            disable_any_whitespace=fields.disable_any_whitespace,
            disable_additional_properties=fields.disable_additional_properties or False,
        )
    return None if response_format is None else of_format(response_format)


def of_format(asked: ResponseFormat) -> StructuredOutputs | None:
    """Raises ApiError (400) or ParameterError."""
    places, field = asked.places, "response_format"
    if len(places) > 1:
        first, second, *_ = places
        raise bad_request(f"{field}.{second}", f"{field}.{second} is set together with {field}.{first}; send one")
    allowed = PLACES[asked.type]
    if not places and asked.type != "json_object" and allowed:
        param = f"{field}.{allowed[0]}"
        raise bad_request(param, f"{param} is missing; it is required where type is {asked.type}")
    for place, value in places.items():
        param = f"{field}.{place}"
        if place not in allowed:
            types = " or ".join(name for name, has in PLACES.items() if place in has)
            raise bad_request(param, f"{param} is set; it may only be where type is {types}")
        if asked.type == "regex":
            if not isinstance(value, str):
                raise bad_request(param, f"{param} is an object; it must be a string", "invalid_type")
            return StructuredOutputs(regex=value)
        if isinstance(value, JsonSchemaFormat):
            value = value.schema_
        elif place == "value" and isinstance(value, dict) and isinstance(value.get("schema"), dict):
            value = value["schema"]  # with its name beside it
        return StructuredOutputs(json=schema_text(value))  # type: ignore[arg-type]  # nothing else is in a place
    return StructuredOutputs(json_object=True) if asked.type == "json_object" else None


# Of each type, the places where it may say what it wants.
PLACES: dict[str, tuple[str, ...]] = {
    "text": (),
    "json_object": ("schema", "value"),
    "json_schema": ("json_schema", "schema", "value"),
    "json": ("value", "schema"),
    "regex": ("value",),
}


def schema_text(schema: Schema | str | None) -> str | None:
    if schema is None or isinstance(schema, str):
        return schema
    return to_json(schema, inf_nan_mode="constants").decode()
