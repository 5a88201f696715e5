"""The workflow document, spec 000 "Create new job", as frozen values: its shape, not its meaning. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from blocks.files import FileObject, parse_file
from blocks.shapes import Aliased, Number, Switch, SwitchTaken, Whole, switch
from flows.errors import InvalidWorkflow, Problem

Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Scalar = Annotated[str, StringConstraints(max_length=2_000, pattern=r"^[^\x00-\x1f\x7f]*$")]


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _flag(value: Any) -> Any:
    return True if value is None else switch(value)


def _text(value: Any) -> Any:
    """Tags such as ``10`` arrive as numbers."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _utf8(value: str) -> str:
    # A lone surrogate, which JSON can spell, would pass every other check and fail when it is first written.
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("has half a character (a lone surrogate)")
    return value


def _json(value: Any) -> Any:
    """Free values, kept to what JSON has, and to a size and depth that all they pass through can take."""
    todo = [(value, 0)]
    seen = 0
    while todo:
        part, depth = todo.pop()
        seen += len(part) if isinstance(part, str) else 1
        if seen > LARGEST_JSON:
            raise ValueError(f"has more than {LARGEST_JSON} characters and values")
        if depth > DEEPEST:
            raise ValueError(f"is nested more than {DEEPEST} deep")
        match part:
            case dict():
                todo.extend((each, depth + 1) for pair in part.items() for each in pair)
            case list() | tuple():
                todo.extend((each, depth + 1) for each in part)
            case str():
                _utf8(part)
            case float() if not math.isfinite(part):
                raise ValueError("has a number that JSON does not have")
    return value


def _file(value: Any) -> Any:
    return parse_file(_json(value)) if isinstance(value, Mapping) else value


DEEPEST: Final = 100
LARGEST_JSON: Final = 1_000_000
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")

Text = Annotated[str, AfterValidator(_utf8)]
Json = Annotated[Any, AfterValidator(_json)]
Index = Annotated[int, Whole(ge=0, le=1_000_000)]
Url = Annotated[str, StringConstraints(min_length=1, max_length=8_192)]
Urls = Annotated[
    tuple[Url, ...],
    BeforeValidator(_one_or_many, json_schema_input_type=Url | tuple[Url, ...]),
]
# The schema tells no more than that it is one: each kind of file has rules of its own, told by /fileinfo.
File = Annotated[FileObject, BeforeValidator(_file, json_schema_input_type=dict[str, Any])]
"""Read by ``parse_file``, whose words name no member of the union, and none of the headers."""
Flag = Annotated[bool, BeforeValidator(_flag, json_schema_input_type=SwitchTaken | None)]
Word = str | int | float


class Document(Aliased):
    """
    Base of every part. Unknown keys are ignored, as the original systems ignore them; values that may be
    secrets (URLs, code, user data) have ``repr=False`` so that no log or error can show them.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        hide_input_in_errors=True,
        str_strip_whitespace=False,
    )


class Remote(Document):
    """An asset to be looked up in a metadata store; contract, section 4. *userdata* goes to its source."""

    tx_id: Scalar = Field(default="", alias="txId")
    service_id: Scalar = Field(default="", alias="serviceId")
    userdata: Json = Field(default=None, repr=False)


class Input(Document):
    """
    One data set: by URL, by look-up; ours: by file objects, or the outputs of another stage. Ours too: *ddo*, its
    public document, which the algorithm finds beside the data.
    """

    id: Scalar = ""
    index: Index | None = None
    url: Urls = Field(default=(), repr=False)
    files: tuple[File, ...] = Field(default=(), repr=False)
    remote: Remote | None = None
    stage: Index | None = None
    ddo: Annotated[dict[str, Any], AfterValidator(_json)] | None = Field(default=None, repr=False)


class Resources(Document):
    """What a stage asks for; never more than its environment allows. *ram* and *disk* are GiB."""

    cpu: Annotated[float, Number(gt=0, le=4096)] | None = None
    ram: Annotated[float, Number(gt=0, le=65_536)] | None = None
    disk: Annotated[float, Number(gt=0, le=1_048_576)] | None = None
    gpu: Annotated[int, Whole(ge=0, le=1024)] | None = None


class Compute(Document):
    instances: Annotated[int, Whole()] = Field(default=1, validation_alias=AliasChoices("Instances", "instances"))
    namespace: Scalar = ""
    maxtime: Annotated[float, Number(gt=0, le=31_536_000)] | None = None
    """Seconds; the smaller of it and the environment's limit holds."""
    resources: Resources = Resources()
    network: Switch | None = None
    """Ours. False takes the algorithm's network away; else the environment says whether it has one."""


class Container(Document):
    image: Scalar = ""
    tag: Annotated[Scalar, BeforeValidator(_text, json_schema_input_type=Scalar | int | float)] = "latest"
    checksum: Scalar | None = None
    entrypoint: Annotated[Text, StringConstraints(max_length=10_000)] = Field(default="", repr=False)


class Algorithm(Document):
    """
    One of url, rawcode, remote; ``url`` wins over ``rawcode``, as in the document's own example, and both over
    ``remote``. Ours: ``file``, a file object, which wins over all of them, and ``sha256``, the checksum that what is
    fetched has to have. ``algouserdata`` goes to the source of a remote algorithm that has no userdata of its own.
    """

    id: Scalar | None = None
    url: Annotated[str, StringConstraints(max_length=8_192)] | None = Field(default=None, repr=False)
    file: File | None = Field(default=None, repr=False)
    rawcode: Text | None = Field(default=None, repr=False)
    remote: Remote | None = None
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$", to_lower=True)] | None = None
    container: Container = Container()
    algocustomdata: Json = Field(default=None, repr=False)
    algouserdata: Json = Field(default=None, repr=False)
    envs: Mapping[Text, Annotated[Text, BeforeValidator(_text, json_schema_input_type=Word)]] | None = Field(
        default=None, repr=False
    )


class Output(Document):
    """Where results go. Every key in both of its spellings; contract, section 4."""

    brizo_uri: Scalar | None = Field(default=None, validation_alias=AliasChoices("brizoUri", "brizoUrl"))
    metadata_uri: Scalar | None = Field(default=None, validation_alias=AliasChoices("metadataUri", "metadataUrl"))
    secret_store_uri: Scalar | None = Field(
        default=None, validation_alias=AliasChoices("secretStoreUri", "secretStoreUrl")
    )
    node_uri: Scalar | None = Field(default=None, validation_alias=AliasChoices("nodeUri", "nodeUrl"))
    brizo_address: Scalar | None = Field(default=None, validation_alias=AliasChoices("brizoAddress"))
    whitelist: tuple[Scalar, ...] = ()
    owner: Scalar | None = None
    publish_output: Flag = Field(default=True, validation_alias=AliasChoices("publishoutput", "publishOutput"))
    publish_algorithm_log: Flag = Field(
        default=True, validation_alias=AliasChoices("publishalgolog", "publishAlgorithmLog")
    )


class Stage(Document):
    """
    Every part is required, and the plan says so where one is missing: refused here, it would hide all that is wrong
    with the parts that are there.
    """

    index: Index | None = None
    input: tuple[Input, ...] = ()
    compute: Compute = Compute()
    algorithm: Algorithm = Algorithm()
    output: Output = Output()
    depends_on: tuple[Index, ...] | None = Field(default=None, alias="dependsOn")


class Workflow(Document):
    """Agreement and owner are required too; see ``Stage``."""

    agreement_id: Name = Field(default="", alias="agreementId")
    owner: Name = ""
    stages: tuple[Stage, ...] = ()


REQUIRED: Final = "is required"
PARTS: Final = ("algorithm", "compute", "input", "output")


def parse_workflow(document: Any) -> Workflow:
    """
    The document as values.

    Raises:
        InvalidWorkflow: Every fault of shape at once, each with its path; nothing of the document is quoted.
    """
    try:
        return Workflow.model_validate(document)
    except ValidationError as fault:
        faults = [
            Problem(_path(error["loc"]), error["msg"].removeprefix("Value error, "))
            for error in fault.errors(include_url=False, include_context=False, include_input=False)
        ]
    raise InvalidWorkflow([*faults, *_missing(document)])


def _missing(document: Any) -> Iterator[Problem]:
    """What the plan would say of missing parts, for a document it does not get to see."""
    if not isinstance(document, Mapping):
        return
    for name in ("agreementId", "owner", "stages"):
        if name not in document:
            yield Problem(name, REQUIRED)
    stages = document.get("stages")
    for position, stage in enumerate(stages if isinstance(stages, list) else ()):
        for part in PARTS if isinstance(stage, Mapping) else ():
            if part not in stage:
                yield Problem(f"stages.{position}.{part}", REQUIRED)


def _path(location: tuple[int | str, ...]) -> str:
    """Dotted; what stands in place of a variable's name and is none is not quoted."""
    parts = list(map(str, location))
    if "envs" in parts:
        place = parts.index("envs") + 1
        parts[place:] = [name for name in parts[place : place + 1] if _VARIABLE.fullmatch(name)]
    return ".".join(parts) or "workflow"
