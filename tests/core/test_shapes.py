"""Values are taken as their JSON Schema tells, no more and no less."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import AliasChoices, Field, TypeAdapter, ValidationError

from blocks.shapes import Aliased, Number, Switch, Whole

WHOLE: TypeAdapter[int] = TypeAdapter(Annotated[int, Whole(ge=0, le=100)])
NUMBER: TypeAdapter[float] = TypeAdapter(Annotated[float, Number(gt=0, le=100)])
SWITCH: TypeAdapter[bool] = TypeAdapter(Switch)


@pytest.mark.parametrize(
    ("adapter", "value", "read"),
    [
        (WHOLE, 7, 7),
        (WHOLE, 7.0, 7),
        (WHOLE, "7", 7),
        (NUMBER, 0.5, 0.5),
        (NUMBER, "0.5", 0.5),
        (NUMBER, 3, 3.0),
        (SWITCH, True, True),
        (SWITCH, "False", False),
        (SWITCH, 1, True),
        (SWITCH, "0", False),
    ],
)
def test_a_value_and_its_text_are_read_the_same(adapter: TypeAdapter[Any], value: Any, read: Any) -> None:
    """Clients write numbers as texts; in a query string there is nothing else."""
    assert read == adapter.validate_python(value)
    assert adapter.json_schema()["anyOf"]


@pytest.mark.parametrize(
    ("adapter", "value"),
    [
        (WHOLE, True),
        (WHOLE, "1_0"),
        (WHOLE, " 1"),
        (WHOLE, "1\n"),
        (WHOLE, "+1"),
        (WHOLE, "٣"),
        (WHOLE, "101"),
        (WHOLE, 1.5),
        (WHOLE, 10**400),
        (WHOLE, float("inf")),
        (WHOLE, None),
        (NUMBER, True),
        (NUMBER, "1e3"),
        (NUMBER, "nan"),
        (NUMBER, float("nan")),
        (NUMBER, 10**400),
        (NUMBER, 0),
        (SWITCH, "yes"),
        (SWITCH, 2),
        (SWITCH, 1.0),
        (SWITCH, None),
    ],
)
def test_what_only_looks_like_a_value_is_refused(adapter: TypeAdapter[Any], value: Any) -> None:
    """Pydantic's lenient reading takes true for 1, "1_0" for 10 and "yes" for true."""
    with pytest.raises(ValidationError):
        adapter.validate_python(value)


def test_a_schema_tells_every_name() -> None:
    """Both spellings of a key."""

    class Output(Aliased):
        publish: Annotated[bool, Field(validation_alias=AliasChoices("publishoutput", "publishOutput"))] = True

    properties = Output.model_json_schema()["properties"]
    assert {"publishoutput", "publishOutput"} == set(properties)
    assert "boolean" == properties["publishOutput"]["type"]
