"""What a refusal is answered with, in the form of the dialect that was spoken. Contract, section 6."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request

from api.parameters import label
from api.wire import operator_text
from flows.errors import (
    AgreementInUse,
    AssetRefused,
    BadSignature,
    InvalidParameter,
    InvalidWorkflow,
    MissingParameter,
    Problem,
    Refusal,
    ReplayedNonce,
)

Answer = tuple[int, dict[str, Any]]
"""HTTP status and body."""

_FIELD: Final = re.compile(r"([A-Za-z][\w.\[\]]*): (.+)", re.DOTALL)
_STAGE: Final = re.compile(r"stages\.\d+\.")


def refused(request: Request, refusal: Refusal) -> Answer:
    """*refusal* in the dialect of *request*."""
    for prefix, render in _DIALECTS.items():
        if request.url.path.startswith(prefix):
            return render(request, refusal)
    return _operator(request, refusal)


def invalid(request: Request, fault: RequestValidationError) -> Answer:
    """Parameters of the wrong form, in the dialect of *request*."""
    problems = [
        Problem(".".join(map(str, error["loc"])) or "request", error["msg"].removeprefix("Value error, "))
        for error in fault.errors()
    ]
    missing = [str(error["loc"][-1]) for error in fault.errors() if error["type"] == "missing"]
    if request.url.path.startswith(PROVIDER):
        required = {
            ".".join(map(str, error["loc"])): _required(str(error["loc"][-1]))
            for error in fault.errors()
            if error["type"] == "missing"
        }
        return _fields({problem.path: required.get(problem.path, problem.message) for problem in problems})
    text = str(MissingParameter(missing[0], label(request))) if missing else "; ".join(map(str, problems))
    return 400, {"error": text, "problems": _listed(problems)}


def _operator(request: Request, refusal: Refusal) -> Answer:
    if isinstance(refusal, InvalidWorkflow):
        texts = dict.fromkeys(operator_text(problem, label(request)) for problem in refusal.problems)
        return refusal.http, {"error": "; ".join(texts), "problems": _listed(refusal.problems)}
    return refusal.http, {"error": str(refusal)}


def _provider(_: Request, refusal: Refusal) -> Answer:  # noqa: PLR0911 - a table, as it reads
    match refusal:
        case AssetRefused():
            return 400, {"error": {refusal.resource: refusal.code}, "message": str(refusal)}
        case AgreementInUse():
            return 400, {
                "error": {"order": "in_use_or_not_on_chain"},
                "message": "transferTxId: this order has had its job; reuse it on chain, or order anew",
            }
        # The original answers them as faults of a field, with 400.
        case BadSignature():
            return _fields({"signature": "Invalid signature provided."})
        case ReplayedNonce():
            return _fields({"nonce": "must be greater than the last one accepted for this address"})
        case MissingParameter():
            return _fields({refusal.name: _required(refusal.name)})
        case InvalidWorkflow():
            problems = [Problem(_STAGE.sub("", problem.path), problem.message) for problem in refusal.problems]
            return 400, {"error": "; ".join(map(str, problems)), "problems": _listed(problems)}
        case InvalidParameter() if found := _FIELD.fullmatch(str(refusal)):
            return _fields({found[1]: found[2]})
    return refusal.http, {"error": str(refusal)}


def _brizo(request: Request, refusal: Refusal) -> Answer:
    match refusal:
        case AssetRefused():
            return 400, {"error": f"{refusal.resource}: {refusal}", "code": refusal.code}
        case AgreementInUse():
            return 400, {"error": "serviceAgreementId: has had its job; to start that one again, name it by jobId"}
        case InvalidWorkflow():
            return _provider(request, refusal)
    return _operator(request, refusal)


def _fields(faults: Mapping[str, str]) -> Answer:
    return 400, {
        "success": False,
        "message": "Validation error",
        "errors": {name: [text] for name, text in faults.items()},
    }


def _required(name: str) -> str:
    return f"The {name} field is required."


def _listed(problems: Iterable[Problem]) -> list[dict[str, str]]:
    return [{"path": problem.path, "message": problem.message} for problem in problems]


PROVIDER: Final = "/api/services"
_DIALECTS: Final[Mapping[str, Callable[[Request, Refusal], Answer]]] = {
    PROVIDER: _provider,
    "/api/v1/brizo": _brizo,
}
