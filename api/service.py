"""What the handlers work with, put together once in ``api.app``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends
from fastapi.requests import Request

from api.auth import OperatorGate
from api.links import Links
from api.settings import Settings
from flows.jobs import Jobs


@dataclass(frozen=True)
class Service:
    settings: Settings
    jobs: Jobs
    gate: OperatorGate
    links: Links


def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


ServiceDep = Annotated[Service, Depends(_service)]
