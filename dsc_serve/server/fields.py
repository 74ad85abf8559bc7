"""What every request body is made of: strict models, and the types of fields that are not supported."""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dsc_serve.server.errors import from_validation

MAX_COUNT = 2**31 - 1

Count = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)]


class Only:
    """The type of a field that is not supported: null, or one of `values`, with which it would do nothing."""

    def __init__(self, *values: object) -> None:
        self.values = values

    def check(self, value: object) -> object:
        if value is None or any(type(value) is type(neutral) and value == neutral for neutral in self.values):
            return value
        allowed = " or ".join(["null", *(msgspec.json.encode(neutral).decode() for neutral in self.values)])
        # Passed as a parameter, since the template would take its braces for places to fill.
        raise PydanticCustomError("unsupported", "is not supported; it may only be {allowed}", {"allowed": allowed})

    def __get_pydantic_core_schema__(self, _source: object, _handler: object) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: object) -> JsonSchemaValue:
        return {"enum": [None, *self.values], "description": "Not supported: accepted only where it does nothing."}


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Raises ApiError (400) naming the first field that is wrong."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise from_validation(error, cls.model_fields) from None
