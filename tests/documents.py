"""Workflow documents for tests, as a consumer would post them: only what a test is about has to be said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from blocks.limits import Limits, Offer
from flows.plan import Plan, compile_plan
from flows.workflow import Workflow, parse_workflow

OWNER: Final = "0x3aA8c0B3dE1f57d294f6B1c5a7E9024D86Fb51c2"
ENVIRONMENT: Final = "default"


def data(id: str = "did:op:01", *urls: str, **more: Any) -> dict[str, Any]:
    """An input by URL; without one, by a URL that nothing fetches."""
    return {"id": id, "url": list(urls) or ["https://example.com/data.csv"], **more}


def files(id: str = "did:op:01", *objects: Any, **more: Any) -> dict[str, Any]:
    """An input by file objects."""
    return {"id": id, "files": list(objects), **more}


def outputs_of(stage: int, **more: Any) -> dict[str, Any]:
    """An input that is what another stage has put out."""
    return {"stage": stage, **more}


def stage(
    index: int | None = None,
    *,
    input: list[dict[str, Any]] | None = None,
    after: list[int] | None = None,
    environment: str = ENVIRONMENT,
    rawcode: str | None = "print('hello')",
    url: str | None = None,
    entrypoint: str = "python3 $ALGO",
    algorithm: Mapping[str, Any] | None = None,
    compute: Mapping[str, Any] | None = None,
    output: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    One stage that needs nothing and says hello. *after* is ``dependsOn``, left out when None.

    *algorithm*, *compute* and *output* are laid over what the other arguments say.
    """
    return {
        **({} if index is None else {"index": index}),
        "input": [] if input is None else input,
        **({} if after is None else {"dependsOn": after}),
        "compute": {"Instances": 1, "namespace": environment, "maxtime": 60, **(compute or {})},
        "algorithm": {
            **({} if rawcode is None else {"rawcode": rawcode}),
            **({} if url is None else {"url": url}),
            "container": {"image": "python", "tag": "3.12", "entrypoint": entrypoint},
            **(algorithm or {}),
        },
        "output": dict(output or {}),
    }


def workflow(
    *, stages: list[dict[str, Any]] | None = None, agreement: str = "111", owner: str = OWNER, **more: Any
) -> dict[str, Any]:
    """A whole document, without the outer ``workflow`` key; one stage unless *stages* says which."""
    return {"agreementId": agreement, "owner": owner, "stages": [stage()] if stages is None else stages, **more}


def parsed(*stages: dict[str, Any], **more: Any) -> Workflow:
    return parse_workflow(workflow(stages=list(stages) or None, **more))


def offer(id: str = ENVIRONMENT, *, limits: Limits | None = None, **more: Any) -> Offer:
    return Offer(id=id, limits=limits or Limits(), **more)


def planned(*stages: dict[str, Any], on: Offer | None = None) -> Plan:
    """The plan of these stages in the environment *on*."""
    environment = on or offer()
    return compile_plan(parsed(*stages), {environment.id: environment})
