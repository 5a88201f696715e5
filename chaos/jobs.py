"""The jobs of the crash test: made so that each stays where it is to be hit, and held against what was promised."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import UUID, uuid4

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.exceptions import PrefectHTTPStatusError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from blocks.store import Kind, ResultStore, StoreUnavailable
from chaos.parts import OPERATOR, Stand, ended, is_held, processes_with
from chaos.plan import Shape
from flows.states import history, run_status, steps_of
from flows.status import TERMINAL, TEXT, Status
from tests.documents import data, outputs_of, stage, workflow

WIDE: Final = "wide"
NARROW: Final = "narrow"
SLOW: Final = "slow"
INPUT: Final = "did:op:source"
PATIENCE: Final = 90.0
"""Seconds a consumer goes on asking a service that is away."""
GRACE: Final = 5.0
"""Seconds after a job's end until its processes and its folder have to be gone."""
LINE_DELAY: Final = 0.25
"""Seconds a request to the slow store is held back; to publish a job takes some ten of them."""
FILTERED_PER_SECOND: Final = 30 * 2**20
"""Bytes of text the filter looks at in a second, about."""
PADDING: Final = 300 * 1024
"""Makes a document too large for a parameter of a run, so that the flow begins by fetching it from the store."""

_HIDDEN: Final = (Kind.CONFIGURATION_LOG, Kind.PUBLISH_LOG)

_ALGORITHM: Final = """
import hashlib, os, time, uuid
outputs = os.environ["OUTPUTS"]
open(outputs + "/run-" + uuid.uuid4().hex, "w").write("once")
time.sleep({seconds})
with open(outputs + "/filler.txt", "w") as filler:
    for _ in range({filler}):
        filler.write("all work and no play\\n" * 50000)
source = open(os.environ["INPUTS"] + "/{source}", "rb").read()
open(outputs + "/result", "w").write(hashlib.sha256(source + b"{number}").hexdigest())
"""

T = TypeVar("T")


def _digest(source: bytes, number: int) -> str:
    return hashlib.sha256(source + b"%d" % number).hexdigest()


def _may_pass(fault: BaseException) -> bool:
    """The service is away or says itself that it has to be asked again."""
    if isinstance(fault, httpx.HTTPStatusError | PrefectHTTPStatusError):
        return fault.response.status_code >= 500
    return isinstance(fault, httpx.TransportError | StoreUnavailable)


def patiently(ask: Callable[[], T]) -> T:
    """What *ask* answers, asked again while the service is away."""
    return Retrying(
        retry=retry_if_exception(_may_pass), stop=stop_after_delay(PATIENCE), wait=wait_fixed(0.2), reraise=True
    )(ask)


@dataclass(eq=False)
class Job:
    """One job of a kill. Its *token* stands on the command line of its algorithms, and nowhere else."""

    shape: Shape
    environment: str
    url: str
    """Of its input."""
    token: str = field(default_factory=lambda: f"chaos-{uuid4().hex}")
    agreement: str = field(default_factory=lambda: uuid4().hex)
    id: str = ""
    killed: bool = False
    """Its algorithm was, on purpose."""
    given_up: bool = False
    """It did not end and was deleted, so that the next kill finds room."""

    @classmethod
    def of(cls, shape: Shape, stand: Stand, environment: str | None = None) -> Job:
        slow = shape.status in (Status.STARTED, Status.PUBLISHING)
        delay = shape.seconds if shape.status in (Status.CONFIGURING, Status.PROVISIONED) else 0.0
        url = stand.files.add(b"%d" % shape.number, delay=delay)
        return cls(shape, environment or (SLOW if slow else WIDE), url)

    @property
    def document(self) -> dict[str, Any]:
        return workflow(agreement=self.agreement, stages=list(self._stages()))

    def _stages(self) -> Iterator[dict[str, Any]]:
        shape = self.shape
        for index in range(shape.stages):
            first = index == 0
            filler = shape.seconds * FILTERED_PER_SECOND / 2**20 if first and shape.status is Status.FILTERING else 0
            code = _ALGORITHM.format(
                seconds=shape.seconds if first and shape.status is Status.RUNNING else 0.0,
                filler=round(filler),
                source=f"{INPUT.removeprefix('did:op:')}/0" if first else "before/result",
                number=shape.number,
            )
            if shape.status is Status.STARTED and first:
                # Of what cannot be compressed.
                code += f"# {random.Random(shape.number).randbytes(PADDING).hex()}\n"
            yield stage(
                index=index,
                input=[data(INPUT, self.url) if first else outputs_of(0, id="before")],
                environment=self.environment,
                rawcode=code,
                entrypoint=f"python3 $ALGO {self.token}",
            )

    def submit(self, url: str) -> None:
        """As a consumer does who does not know whether a call has arrived: the same again, until it is answered."""

        def post() -> str:
            answer = httpx.post(f"{url}{OPERATOR}/init", json={"workflow": self.document}, timeout=30.0)
            return answer.raise_for_status().text

        self.id = patiently(post)

    def algorithm(self) -> list[psutil.Process]:
        """Its processes of this moment; of the shell and the sandbox around it only the names are different."""
        found = []
        for process in processes_with(self.token.encode()):
            with suppress(psutil.Error):
                if process.name().startswith("python"):
                    found.append(process)
        return found

    @property
    def results(self) -> list[str]:
        """What its stages have to put out, in order."""
        source = b"%d" % self.shape.number
        digests = []
        for _ in range(self.shape.stages):
            digests.append(_digest(source, self.shape.number))
            source = digests[-1].encode()
        return digests

    def __str__(self) -> str:
        return f"{self.id or self.agreement} ({int(self.shape.status)}, {self.shape.stages} stages, {self.environment})"


@dataclass(frozen=True)
class Record:
    """What Prefect knows of a job."""

    run: FlowRun
    states: list[State[Any]]
    task_runs: list[TaskRun]

    @property
    def status(self) -> Status:
        return run_status(self.run.state, steps_of(self.task_runs, of=self.run.state))[0]

    @property
    def final(self) -> bool:
        return self.run.state is not None and self.run.state.is_final()

    def status_at(self, at: float) -> Status:
        """The one it was in at the Unix time *at*, as its history shows."""
        before = [passed for passed in history(self.states, self.task_runs) if passed.at.timestamp() <= at]
        return before[-1].status if before else Status.WARMING_UP

    def revived(self) -> str | None:
        """The states since the first that was final, in words, if that was not the last."""
        ordered = sorted(self.states, key=lambda state: state.timestamp)
        first = next((n for n, state in enumerate(ordered) if state.is_final()), None)
        if first is None or first == len(ordered) - 1:
            return None
        return " > ".join(f"{state.name} ({state.message or ''})" for state in ordered[first:])

    @property
    def way(self) -> str:
        """All that it went through, for who looks into a failure."""
        states = sorted(self.states, key=lambda state: state.timestamp)
        passed = history(self.states, self.task_runs)
        return (
            f"{' > '.join(f'{state.name}@{state.timestamp:%T}' for state in states)}; "
            f"{' > '.join(f'{int(one.status)}@{one.at:%T}' for one in passed)}"
        )


class Records:
    """Prefect's records, asked of the server directly: quicker than the API, and what it has to answer by."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client

    def runs(self, job: Job) -> list[FlowRun]:
        """Every run under the agreement of *job*; there is to be one."""
        wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[f"agreement:{job.agreement}"]))
        return patiently(lambda: self._client.read_flow_runs(flow_run_filter=wanted))

    def run(self, job: Job) -> FlowRun:
        return patiently(lambda: self._client.read_flow_run(UUID(job.id)))

    def of(self, job: Job) -> Record:
        id = UUID(job.id)
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=[id]))
        return Record(
            patiently(lambda: self._client.read_flow_run(id)),
            patiently(lambda: self._client.read_flow_run_states(id)),
            patiently(lambda: self._client.read_task_runs(flow_run_filter=wanted)),
        )


@dataclass(frozen=True)
class Broken:
    """A promise to a job that was not kept."""

    expected: str
    seen: str


@dataclass(frozen=True)
class Judge:
    """Holds jobs against what is promised, by all that can be seen of them."""

    stand: Stand
    records: Records

    def store(self, job: Job) -> ResultStore:
        # By itself, not by the slow line.
        options = {**self.stand.store_options, "endpoint_url": self.stand.store_url}
        local = (self.stand.folder / "state" / "store" / "results").as_uri()
        return ResultStore("s3://results/results", options) if job.environment == SLOW else ResultStore(local)

    def published(self, job: Job) -> str:
        """All that a consumer may have of *job*, in a form that can be compared."""
        manifest = patiently(lambda: self.store(job).manifest(job.id))
        return manifest.model_dump_json() if manifest is not None else ""

    def folder(self, job: Job) -> Path:
        return self.stand.workspace / job.id

    def completed(self, job: Job) -> bool:
        state = self.records.run(job).state
        return state is not None and state.is_completed()

    def behind(self, job: Job) -> bool:
        """Whether somebody works on *job* at this moment."""
        return bool(job.algorithm()) or is_held(self.folder(job) / "lock")

    def of_ended(self, job: Job) -> Iterator[Broken]:
        """Of a job whose run is in a final state."""
        record = self.records.of(job)
        told = self._told(job)
        wanted = Status.RUN_FAILED if job.killed else Status.COMPLETED
        if told["status"] != wanted:
            yield Broken(
                f"status {int(wanted)}", f"{told['status']} {told['statusText']}: {told['reason']}; {record.way}"
            )
        passed = [Status(entry["status"]) for entry in told["history"]]
        early = [status for status in passed[:-1] if status in TERMINAL]
        if early:
            yield Broken("one end, and the last", f"{[int(status) for status in passed]}; {record.way}")
        if revived := record.revived():
            yield Broken("no state after a final one", revived)
        if len(runs := self.records.runs(job)) != 1:
            yield Broken("one run of one agreement", f"{len(runs)}")
        yield from self._results(job, told)
        if left := ended(processes_with(job.token.encode()), GRACE):
            yield Broken("no process of an ended job", "; ".join(left))
        if is_held(self.folder(job) / "lock"):
            yield Broken("nobody works on an ended job", "its folder is held")
        # Where one is left of a job that failed, it is there for a restart.
        if told["status"] == Status.COMPLETED and self.folder(job).exists():
            yield Broken("no folder of a job that completed", f"{self.folder(job)}")

    def _results(self, job: Job, told: dict[str, Any]) -> Iterator[Broken]:
        store = self.store(job)
        stages = 1 if job.killed else job.shape.stages
        if (parts := patiently(lambda: store.stages(job.id))) != frozenset(range(stages)):
            yield Broken(f"the manifests of {stages} stages", f"those of {sorted(parts)}")
            return
        manifest = patiently(lambda: store.manifest(job.id))
        files = manifest.ordered() if manifest is not None else ()
        # The other logs are for admins.
        shown = [(file.path, file.sha256) for file in files if file.kind not in _HIDDEN]
        if shown != (seen := [(result["filename"], result["sha256"]) for result in told["results"]]):
            yield Broken(f"the results that are in the store, {shown}", f"{seen}")
        for n, digest in enumerate(job.results if not job.killed else ()):
            outputs = [file for file in files if file.kind is Kind.OUTPUT and file.stage == n]
            runs = [file.path for file in outputs if Path(file.path).name.startswith("run-")]
            if len(runs) != 1:
                yield Broken(f"results of one run in stage {n}", f"{runs}")
            results = [store.read_bytes(job.id, file.name) for file in outputs if Path(file.path).name == "result"]
            if results != [digest.encode()]:
                yield Broken(f"result {digest} in stage {n}", f"{results}")
        for file in files:
            if store.size(job.id, file.name) != file.size:
                yield Broken(f"{file.size} bytes of {file.path}", f"{store.size(job.id, file.name)}")

    def _told(self, job: Job) -> dict[str, Any]:
        """What the API says of it once the records of its steps are complete: they come a moment behind its end."""

        def ask() -> dict[str, Any]:
            answer = httpx.get(
                f"{self.stand.service.api_url}{OPERATOR}/compute", params={"jobId": job.id}, timeout=30.0
            )
            (told,) = answer.raise_for_status().json()
            return dict(told)

        deadline = time.monotonic() + GRACE
        told = patiently(ask)
        while not (told["results"] and told["dateFinished"]) and time.monotonic() < deadline:
            time.sleep(0.2)
            told = patiently(ask)
        return told

    def of_live(self, job: Job) -> Broken:
        """Of a job that has not ended in time."""
        record = self.records.of(job)
        somebody = "somebody works on it" if self.behind(job) else "nobody works on it"
        return Broken("an end", f"{int(record.status)} {TEXT[record.status]}, and {somebody}; {record.way}")
