"""
Refusals: what a caller did wrong, as a tree. Pure.

A refusal is raised, mapped to an answer once (``api.app``), and never logged as an error of ours.
Failures of a job are values (``flows.status``); anything else that is raised is a bug and answered 500.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong with a document. *path* is dotted, positions as numbers: ``stages.0.algorithm``."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class Refusal(Exception):
    """The caller's fault. *slug* is stable for programs, the message is for people and quotes no secret."""

    slug: ClassVar[str] = "refused"
    http: ClassVar[int] = 400


class InvalidWorkflow(Refusal):
    """The document cannot be run; every problem found is in *problems*."""

    slug = "invalid-workflow"

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        super().__init__("; ".join(map(str, self.problems)))


class EmptyPayload(Refusal):
    slug = "empty-payload"

    def __init__(self) -> None:
        super().__init__("payload seems empty.")


class MissingParameter(Refusal):
    slug = "missing-parameter"

    def __init__(self, name: str, call: str) -> None:
        self.name = name
        super().__init__(f'"{name}" is required in the call to {call}')


class InvalidParameter(Refusal):
    slug = "invalid-parameter"


class NoSelector(Refusal):
    """Neither job, agreement nor owner was named; never read as "all jobs"."""

    slug = "no-selector"

    def __init__(self) -> None:
        super().__init__("You have to specify one of agreementId, jobId or owner")


class UnknownEnvironment(Refusal):
    slug = "unknown-environment"

    def __init__(self) -> None:
        super().__init__("Environment invalid or does not exist")


class AgreementInUse(Refusal):
    slug = "agreement-in-use"

    def __init__(self) -> None:
        super().__init__("`agreementId` already in use for other job.")


class BadSignature(Refusal):
    slug = "bad-signature"
    http = 401

    def __init__(self, message: str = "Failed to recover address") -> None:
        super().__init__(message)


class BadToken(Refusal):
    """An auth token that is none, has expired, or was deleted."""

    slug = "bad-token"
    http = 401


class AssetRefused(Refusal):
    """
    What a consumer asked for cannot be had. *resource* names the part of the request, *code* is the Provider's word
    for why (contract, section 6), the message says it to people.
    """

    slug = "asset-refused"

    def __init__(self, resource: str, code: str, message: str) -> None:
        self.resource = resource
        self.code = code
        super().__init__(message)


class NotAllowed(Refusal):
    slug = "not-allowed"
    http = 403


class ReplayedNonce(Refusal):
    slug = "replayed-nonce"
    http = 401

    def __init__(self) -> None:
        super().__init__("`nonce` must be greater than the last one accepted for this address")


class JobNotFound(Refusal):
    slug = "job-not-found"
    http = 404


class NotRestartable(Refusal):
    """The job is still going, or there is nothing left of it to do; the message says which and what to do."""

    slug = "not-restartable"
    http = 409


class NoSuchResult(Refusal):
    slug = "no-such-result"
    http = 404


class ResultsExpired(Refusal):
    """What the job has published is kept no longer; the message says since when. Its record stays."""

    slug = "results-expired"
    http = 410


class LinkExpired(Refusal):
    slug = "link-expired"
    http = 410

    def __init__(self) -> None:
        super().__init__("This link has expired; ask for the job's status again to get a new one.")


class NotReady(Refusal):
    """The service, not the request, stands in the way for now."""

    slug = "not-ready"
    http = 503


class SourceFailed(Refusal):
    """Where a file is kept does not give it: neither the request's fault nor ours."""

    slug = "source-failed"
    http = 502
