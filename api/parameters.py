"""
Parameters of a call: from the query string or a JSON body, whatever the verb, as real clients send them.

Contract, section 1. Bodies are read strictly: what two readers could understand differently is refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from pydantic import ConfigDict, ValidationError
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool

from api.service import ServiceDep
from blocks.shapes import Aliased
from flows.errors import EmptyPayload, InvalidParameter, Refusal

MAX_DEPTH: Final = 64
_SHOWN_FAULTS: Final = 10


class BodyTooLarge(Refusal):
    slug = "body-too-large"
    http = 413

    def __init__(self, limit: int) -> None:
        super().__init__(f"The body is larger than {limit} bytes")


class Call(Aliased):
    """Base of what a call takes. Names are those on the wire; unknown ones are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


C = TypeVar("C", bound=Call)


def given(call: type[C]) -> Callable[..., Awaitable[C]]:
    """The dependency that reads *call* from a request."""

    async def read(request: Request, service: ServiceDep) -> C:
        values = await _values(request, service.settings.max_body_bytes)
        if not values and any(field.is_required() for field in call.model_fields.values()):
            raise EmptyPayload
        try:
            # Off the event loop too: of many small parts it takes longer than the parsing.
            return await run_in_threadpool(call.model_validate, values)
        except ValidationError as fault:
            raise RequestValidationError(
                fault.errors(include_url=False, include_context=False, include_input=False)
            ) from None

    return read


async def _values(request: Request, limit: int) -> dict[str, Any]:
    query = request.query_params.multi_items()
    repeated = sorted(name for name, count in Counter(name for name, _ in query).items() if count > 1)
    if repeated:
        raise InvalidParameter(f"{', '.join(repeated)}: given more than once")
    body = await read_body(request, limit)
    # Off the event loop: a body of some megabytes takes a good part of a second to parse.
    document = await run_in_threadpool(parse_object, body) if body.strip() else {}
    differing = sorted(name for name, value in query if name in document and str(document[name]) != value)
    if differing:
        raise InvalidParameter(f"{', '.join(differing)}: the query string and the body differ")
    return {**dict(query), **document}


async def read_body(request: Request, limit: int) -> bytes:
    """
    The whole body.

    A chunked body tells no length beforehand, so what has arrived is counted, not only what was announced.

    Raises:
        BodyTooLarge
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
        raise BodyTooLarge(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BodyTooLarge(limit)
    return bytes(body)


class _Fault(str):
    """Stands in a parsed document for a value that is refused, and says why."""

    __slots__ = ()


def parse_object(text: bytes | str) -> dict[str, Any]:
    """
    A JSON object.

    Raises:
        InvalidParameter: No JSON, no object, or with values that would not survive: repeated names, NaN, numbers
            out of range, nesting too deep. Says where, quotes nothing but names.
    """
    try:
        written = text.decode("utf-8") if isinstance(text, bytes) else text
        # First by a parser with a bound of its own on depth: what json does with very deep nesting is up to the
        # recursion limit, which other packages raise until the stack overflows. It keeps the last of repeated
        # names, though, so json has to look for those.
        from_json(written)
        document = json.loads(
            written,
            object_pairs_hook=_object,
            parse_float=_float,
            parse_constant=lambda name: _Fault(f"{name} is no JSON number"),
        )
    except UnicodeDecodeError as fault:
        raise InvalidParameter(f"The body is not UTF-8, from byte {fault.start}") from None
    except ValueError as fault:
        raise InvalidParameter(f"The body is not JSON: {fault}") from None
    if not isinstance(document, dict):
        raise InvalidParameter("The body must be a JSON object")
    _refuse_faults(document)
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        found |= {
            name: _Fault("given more than once")
            for name, count in Counter(name for name, _ in pairs).items()
            if count > 1
        }
    return found


def _float(text: str) -> float | _Fault:
    value = float(text)
    return value if math.isfinite(value) else _Fault("the number is out of range")


def _refuse_faults(document: Mapping[str, Any]) -> None:
    faults: list[str] = []
    todo: list[tuple[tuple[str, ...], Any]] = [((), document)]
    while todo and len(faults) < _SHOWN_FAULTS:
        path, value = todo.pop()
        if isinstance(value, _Fault):
            faults.append(f"{'.'.join(path)}: {value}")
        elif len(path) > MAX_DEPTH:
            raise InvalidParameter(f"{path[0]}: nested more than {MAX_DEPTH} deep")
        elif isinstance(value, dict):
            todo.extend(((*path, name[:100]), item) for name, item in value.items())
        elif isinstance(value, list):
            # Strings and numbers cannot hold a fault; skipping them keeps long lists of URLs cheap.
            todo.extend(
                ((*path, str(n)), item) for n, item in enumerate(value) if isinstance(item, dict | list | _Fault)
            )
    if faults:
        raise InvalidParameter("; ".join(sorted(faults)))


def label(request: Request) -> str:
    """The call as the operator texts name it: ``POST:/compute``."""
    return f"{request.method}:/{request.url.path.rpartition('/')[2]}"


def documented(
    call: type[Call], example: Any = None, *, body: bool = True, headers: Iterable[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """
    The OpenAPI part of a handler that reads *call*: by its JSON body, or with *body* off by the query string.

    Every call takes either, whatever its verb, and the document's introduction says so. It shows one of them for each:
    a parameter that may stand in two places is required in neither, and such a description allows what is refused.
    """
    schema = _plain(_inlined(call.model_json_schema()))
    if body:
        content: dict[str, Any] = {"schema": schema}
        if example is not None:
            content["example"] = example
        return {"requestBody": {"required": True, "content": {"application/json": content}}}
    required = schema.get("required", [])
    examples = example or {}
    return {
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": name in required,
                "description": part.get("description", ""),
                **_in_query(part),
                **({"example": _word(examples[name], part)} if name in examples else {}),
            }
            for name, part in schema["properties"].items()
        ]
        + [dict(header) for header in headers]
    }


def _in_query(part: Mapping[str, Any]) -> dict[str, Any]:
    """
    A parameter's schema where it stands in a query string: what is not one word is written as JSON there. Of several
    kinds it is the first, since 1 and "1" are written the same.
    """
    schema = {name: value for name, value in part.items() if name not in ("description", "examples")}
    kind = schema.pop("anyOf", [schema])[0]
    if kind.get("type") in _WORDS:
        return {"schema": kind}
    return {"content": {"application/json": {"schema": kind}}}


def _word(example: Any, part: Mapping[str, Any]) -> Any:
    return str(example) if _in_query(part).get("schema", {}).get("type") == "string" else example


_WORDS: Final = frozenset({"string", "integer", "number", "boolean"})


def _plain(schema: Any) -> Any:
    """Without titles, which repeat the names, and without defaults that stand for "left out" and cannot be sent."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: {each: _plain(part) for each, part in value.items()} if name == "properties" else _plain(value)
        for name, value in schema.items()
        if not (name == "title" and isinstance(value, str)) and not (name == "default" and value in ("", None, {}))
    }


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Without ``$defs``: a schema that stands inside an OpenAPI document cannot point to its own root."""
    definitions = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                name = part["$ref"].rpartition("/")[2]
                return {**resolved(definitions[name]), **{key: part[key] for key in part if key != "$ref"}}
            return {key: resolved(value) for key, value in part.items()}
        return [resolved(each) for each in part] if isinstance(part, list) else part

    return dict(resolved(schema))
