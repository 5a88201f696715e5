"""
The OpenAPI document, fuzzed: whatever a client sends, the answer is one that the document tells.

Every check of schemathesis is on; ``schemathesis.toml`` says which answers are good ones. ``FUZZ_EXAMPLES`` goes deeper
(examples of each call), ``FUZZ_SEED`` repeats a run.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import tomllib
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import schemathesis
import yaml
from eth_account import Account
from eth_account.signers.local import LocalAccount
from schemathesis.config import SchemathesisConfig
from schemathesis.core import NOT_SET
from schemathesis.core.result import Ok
from schemathesis.engine import events, from_schema
from schemathesis.generation.meta import TestPhase
from schemathesis.hooks import HookContext, unregister

from api.app import create_app
from api.service import Service
from blocks.catalogue import LocalCatalogue
from blocks.keys import ProviderKey
from blocks.limits import FetchLimits
from flows.broker import Broker
from flows.jobs import MemoryJobs
from flows.workflow import parse_workflow
from tests import factories
from tests.factories import brizo_sign, next_nonce, sign
from tests.file_server import FileServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

EXAMPLES: Final = int(os.environ.get("FUZZ_EXAMPLES", "40"))
"""Of each call, beside the fifty to seven hundred that follow from its schema alone."""
SEED: Final = int(os.environ.get("FUZZ_SEED", time.time_ns() % 2**32))
CONFIG: Final = Path(__file__).parents[1] / "schemathesis.toml"
ALICE: Final[LocalAccount] = Account.from_key(b"\x0a" * 32)

CONTAINER: Final = {"image": "python", "tag": "3.12", "entrypoint": "python3 $ALGO", "checksum": "sha256:" + "ab" * 32}
AGREEMENT: Final = "0x" + "a1" * 32


def offered(url: str) -> dict[str, Any]:
    """A data set to compute on, one to download, an algorithm, and an agreement of Brizo's; each file is at *url*."""
    return {
        "assets": [
            {
                "id": "did:op:data",
                "name": "data",
                "type": "dataset",
                "files": [url],
                "compute": {"allowRawAlgorithm": True},
            },
            {
                "id": "did:op:open",
                "name": "open",
                "type": "dataset",
                "services": [{"id": "access", "type": "access", "files": [url]}],
            },
            {
                "id": "did:op:algorithm",
                "name": "algorithm",
                "type": "algorithm",
                "container": CONTAINER,
                "files": [url],
            },
        ],
        "agreements": {AGREEMENT: {"did": "did:op:data"}},
    }


@dataclass(frozen=True)
class Served:
    url: str
    service: Service
    jobs: MemoryJobs

    def job(self) -> str:
        """The id of ALICE's job, which has published a file; of the others some are left."""
        mine = [job.id for job in self.jobs._jobs.values() if job.agreement_id == "111"]
        if not mine or len(self.jobs._jobs) > 50 or not self.jobs._jobs[mine[0]].results:
            self.jobs._jobs.clear()
            workflow = parse_workflow(factories.workflow(owner=ALICE.address))
            mine = [asyncio.run(self.jobs.submit(workflow)).id]
            self.jobs.publish(mine[0], [factories.result("a.csv", b"a,b\n1,2\n")])
        return mine[0]

    def link(self) -> str:
        """The token of a link to that file."""
        job = self.jobs._jobs[self.job()]
        return self.service.links.path(job, 0).split("/")[3]


class Meaning:
    """
    Gives a case what cannot be generated: assets and jobs that exist, true signatures, tokens and links; else all that
    would be seen is refusals. Of a malformed case only what has the right form is replaced, so that it stays malformed.
    """

    _FORMS: Final = {
        **dict.fromkeys(("consumerAddress", "userAddress", "address"), r"0x[0-9a-fA-F]{40}"),
        "jobId": r"[0-9a-fA-F]{32}",
        "nonce": r"[0-9]{1,20}",
        **dict.fromkeys(("signature", "providerSignature"), r".{0,8192}"),
    }

    def __init__(self, case: schemathesis.Case[Any], served: Served) -> None:
        self._case = case
        self._served = served
        self._right = case.meta is not None and case.meta.generation.mode.is_positive
        self._given: dict[str, Any] = case.body if isinstance(case.body, dict) else case.query
        self._pick = zlib.crc32(repr((case.operation.label, self._given)).encode(errors="replace"))

    def give(self) -> None:
        if self._pick % 8 == 0:
            return  # as it was generated
        path = self._case.path
        self._put(self._case.path_parameters or {}, "token", self._link())
        if path.startswith("/api/v1/operator"):
            self._name_operators()
        elif path.startswith("/api/v1/brizo"):
            self._name_brizos()
        elif path.startswith("/api/services"):
            self._name_providers()
        if self._right and self._pick % 3 == 0:
            self._turn()

    def _put(self, part: Any, name: str, value: Any) -> None:
        if not isinstance(part, dict):
            return
        old = part.get(name)
        if isinstance(old, int | float) and not isinstance(old, bool):
            old = str(old)
        form = self._FORMS.get(name, r".{1,200}")
        if self._right or (isinstance(old, str) and re.fullmatch(form, old, re.DOTALL)):
            part[name] = value

    def _link(self) -> str:
        return self._served.link()

    def _name_operators(self) -> None:
        given = self._given
        phase = self._case.meta.phase.name if self._case.meta else None
        if phase is TestPhase.STATEFUL and self._case.method != "POST":
            # Of the job that the call before it has made, which needs no signature here.
            given.pop("providerSignature", None)
            return
        if "/compute" not in self._case.path or self._case.method != "POST" or self._pick % 5 == 0:
            self._put(given, "jobId", self._served.job())
        else:
            given.pop("jobId", None)
        self._put(given, "owner", ALICE.address)
        given.pop("agreementId", None)
        self._put(given, "nonce", str(next_nonce()))
        signed = "".join(str(given.get(name, "")) for name in ("owner", "jobId", "nonce"))
        self._put(given, "providerSignature", sign(ALICE, _utf8(signed)))
        workflow = given.get("workflow")
        if isinstance(workflow, dict):
            self._put(workflow, "agreementId", f"{next_nonce()}")
            self._put(workflow, "owner", ALICE.address)
            stages = workflow.get("stages")
            for stage in stages if isinstance(stages, list) else ():
                if isinstance(stage, dict):
                    self._put(stage.get("compute"), "namespace", "small")
        if self._case.path.endswith("getResult") and self._pick % 5:
            self._put(given, "index", 0)

    def _name_brizos(self) -> None:
        given = self._given
        self._put(given, "consumerAddress", ALICE.address)
        starts = self._case.method == "POST"
        if starts == (self._pick % 5 == 0):
            self._put(given, "jobId", self._served.job())
        if starts:
            self._put(given, "serviceAgreementId", AGREEMENT)
        if starts and self._right and self._pick % 5:
            given["algorithmMeta"] = {"rawcode": "print(1)", "container": CONTAINER}
            for name in ("jobId", "output", "algorithmDid", "algorithmDID"):
                given.pop(name, None)
        signed = "".join(str(given.get(name, "")) for name in ("consumerAddress", "jobId", "serviceAgreementId"))
        self._put(given, "signature", brizo_sign(ALICE, _utf8(signed)))

    def _name_providers(self) -> None:
        given, path = self._given, self._case.path.rpartition("/")[2]
        did = {"download": "open", "initialize": "open"}.get(path, "data")
        asset = {"documentId": f"did:op:{did}", "serviceId": "compute" if did == "data" else "access"}
        datasets = given.get("datasets")
        for part in (given, given.get("dataset"), *(datasets if isinstance(datasets, list) else ())):
            if part is not given or path in ("download", "initialize"):
                for name, value in asset.items():
                    self._put(part, name, value)
                if isinstance(part, dict) and self._right:
                    part.pop("userdata", None)
        if self._right and path in ("compute", "initializeCompute") and self._case.method == "POST":
            meta = {"rawcode": "print(1)", "container": CONTAINER}
            published = {"documentId": "did:op:algorithm", "serviceId": "compute"}
            given["algorithm"] = {"meta": meta} if self._pick % 2 else published
            given["environment"] = "small"
            if self._pick % 5:
                for name in ("jobId", "output", "additionalDatasets", "additionalInputs"):
                    given.pop(name, None)
            if isinstance(given.get("compute"), dict):
                given["compute"] = {"env": "small", "validUntil": int(time.time()) + 60}
        if path == "fileinfo" and self._pick % 2:
            self._put(given, "did", "did:op:data")
            self._put(given, "serviceId", "compute")
        if path == "computeResult" or self._pick % 5 == 0:
            self._put(given, "jobId", self._served.job())
        if path == "computeResult" and self._pick % 5:
            self._put(given, "index", 0)
        if path == "download" and self._pick % 5:
            self._put(given, "fileIndex", "0")
        if path == "createAuthToken" and self._pick % 2:
            self._put(given, "expiration", int(time.time()) + 60)
        if path == "deleteAuthToken":
            self._put(
                given, "token", self._served.service.consumers.tokens.create(ALICE.address, int(time.time()) + 60)
            )
        self._sign(path)

    def _sign(self, path: str) -> None:
        given = self._given
        address = "address" if path.endswith("AuthToken") else "consumerAddress"
        for name in (address, "userAddress"):
            if name in given:
                self._put(given, name, ALICE.address)
        # A text, as a query has it.
        self._put(given, "nonce", str(next_nonce()))
        dataset = given.get("dataset")
        named = {
            ("compute", "POST"): ("jobId", dataset.get("documentId", "") if isinstance(dataset, dict) else ""),
            ("computeResult", "GET"): ("jobId", given.get("index", "")),
            ("download", "GET"): ("", given.get("documentId", "")),
        }.get((path, self._case.method), ("jobId", given.get("documentId", "")))
        parts = [
            "" if path == "download" else given.get(address, ""),
            given.get(named[0], ""),
            "" if address == "address" else named[1],
        ]
        self._put(given, "signature", sign(ALICE, _utf8("".join(map(str, [*parts, given.get("nonce", "")])))))

    def _turn(self) -> None:
        """To the other of the two places in which parameters may stand."""
        case = self._case
        # The document tells one place for each call, so schemathesis would take the case for one that is malformed.
        case._meta = None
        if isinstance(case.body, dict):
            case.query = {
                name: value if isinstance(value, str) else json.dumps(value) for name, value in case.body.items()
            }
            case.body = NOT_SET
        elif case.query and case.body is NOT_SET:
            case.body, case.query, case.media_type = dict(case.query), {}, "application/json"


def _utf8(text: str) -> str:
    return text.encode(errors="replace").decode()


@pytest.fixture
def served(tmp_path: Path, file_server: FileServer) -> Iterator[Served]:
    """The app behind a real server, as ``api.main`` runs it, with a job that has published a file."""
    catalogue = tmp_path / "catalogue.yaml"
    file = file_server.add(b"a,b\n1,2\n")
    catalogue.write_text(yaml.safe_dump(offered(file)), encoding="utf-8")
    jobs = MemoryJobs(factories.offers())
    # Where the data sets lie. The rest of loopback answers nothing that fuzzing could hit upon.
    limits = FetchLimits(networks=("127.0.0.0/8",))
    key = ProviderKey.from_secret("07" * 32)
    broker = Broker(jobs=jobs, catalogue=LocalCatalogue(catalogue), key=key, limits=limits, default_environment="small")
    app = create_app(factories.settings(tmp_path), broker)
    with factories.serving(app) as url:
        yield Served(url, app.state.service, jobs)


@pytest.fixture
def meaning(served: Served) -> Iterator[None]:
    @schemathesis.hook
    def before_call(context: HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
        Meaning(case, served).give()

    yield
    unregister(before_call)


@pytest.mark.usefixtures("meaning")
def test_every_answer_is_one_that_the_document_tells(served: Served) -> None:
    """No 5xx, no other status, media type or form; what is malformed is refused; over every phase of schemathesis."""
    with CONFIG.open("rb") as file:
        told = tomllib.load(file)
    told |= {"seed": SEED, "continue-on-failure": True, "generation": {"max-examples": EXAMPLES}}
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json", config=SchemathesisConfig.from_dict(told))

    print(f"FUZZ_SEED={SEED}")
    faults: list[str] = []
    answers: Counter[tuple[str, int]] = Counter()
    for event in from_schema(schema).execute():
        match event:
            case events.ScenarioFinished() | events.FuzzScenarioFinished():
                for number, interaction in event.recorder.interactions.items():
                    if interaction.response is not None:
                        label = event.recorder.cases[number].value.operation.label
                        answers[label, interaction.response.status_code] += 1
                checks = (check for checks in event.recorder.checks.values() for check in checks)
                failures = (check.failure_info for check in checks if check.failure_info is not None)
                faults += [f"{each.failure.operation}: {each.failure}\n{each.code_sample}" for each in failures]
            case events.NonFatalError():
                faults.append(f"{event.label}: {event.value!r}")
            case events.FatalError():
                raise event.exception
    print(*(f"{count:6} {status} {label}" for (label, status), count in sorted(answers.items())), sep="\n")
    assert not faults, "\n\n".join([f"FUZZ_SEED={SEED}", *faults[:20]])
    # Else the meaning was lost on the way, and nothing but refusals would have been seen.
    good = {label for label, status in answers if status < 300}
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert {operation.label for operation in operations} == good
