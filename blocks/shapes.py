"""
Values as they stand in a document or a query string, told to JSON Schema as they are taken. Pure.

Pydantic's own lenient reading takes more than its schema tells: true as the number 1, "1_000", "yes". What is taken
here is what the schema says, no less and no more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_WHOLE: Final = r"^-?[0-9]{1,40}$"
_NUMBER: Final = r"^-?[0-9]{1,40}(\.[0-9]{1,40})?$"
_SWITCH: Final = r"^([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee]|0|1)$"


class Aliased(BaseModel):
    """Base of a model whose schema names every field by all the names it goes by; pydantic tells the first."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        told = handler(schema)
        properties = handler.resolve_ref_schema(told).get("properties", {})
        for field in cls.model_fields.values():
            if isinstance(field.validation_alias, AliasChoices):
                first, *others = map(str, field.validation_alias.choices)
                for other in others:
                    properties[other] = properties[first] | {"description": f"The same as {first}"}
        return told


@dataclass(frozen=True)
class Whole:
    """Annotates an int: a whole number within bounds, or its decimal digits as a text."""

    ge: int | None = None
    le: int | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        number = core_schema.int_schema(ge=self.ge, le=self.le)
        taken = core_schema.union_schema([number, core_schema.str_schema(pattern=_WHOLE)])
        return core_schema.no_info_before_validator_function(_whole, number, json_schema_input_schema=taken)


@dataclass(frozen=True)
class Number:
    """Annotates a float: a number within bounds, or its decimal digits as a text."""

    gt: float | None = None
    le: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        number = core_schema.float_schema(gt=self.gt, le=self.le)
        taken = core_schema.union_schema([number, core_schema.str_schema(pattern=_NUMBER)])
        return core_schema.no_info_before_validator_function(_number, number, json_schema_input_schema=taken)


def _whole(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(_WHOLE, value, re.ASCII):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise PydanticCustomError("whole_number", "must be a whole number, or its digits as a text")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(_NUMBER, value, re.ASCII):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("number", "must be a number, or its digits as a text")
    return value


def switch(value: Any) -> Any:
    """True for true, 1 and "1", as clients of the original systems write them; in any case of letters."""
    read = {"1": True, "0": False, "true": True, "false": False}.get(str(value).lower())
    if read is None or isinstance(value, float):
        raise PydanticCustomError("switch", "must be true or false, 1 or 0, or one of these as a text")
    return read


SwitchTaken = bool | Annotated[int, Field(ge=0, le=1)] | Annotated[str, Field(pattern=_SWITCH)]
Switch = Annotated[bool, BeforeValidator(switch, json_schema_input_type=SwitchTaken)]

JsonText = Annotated[str, Field(description="The same, as JSON in a text")]
"""What a part is taken as beside what it is, for ``json_schema_input_type``."""
