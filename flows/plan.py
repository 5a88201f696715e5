"""A workflow document becomes a frozen, printable plan, or all of its problems at once. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any, Final

from blocks.assets import DID, RemoteAsset, folder_name
from blocks.files import FileObject, GraphqlFile, UrlFile
from blocks.limits import GIB, Limits, Offer
from blocks.urls import HTTP, ForbiddenUrl, check_request, check_url
from flows.errors import InvalidWorkflow, Problem
from flows.status import Phase
from flows.workflow import PARTS, REQUIRED, Algorithm, Compute, Container, Input, Remote, Stage, Workflow

MAX_STAGES: Final = 100
MAX_URLS: Final = 20_000
MAX_RAWCODE: Final = 10 * 1024**2
LONGEST_VARIABLE: Final = 100_000

# A data set's id is a folder name under /data/inputs, so nothing may pass that a file system or a shell reads
# differently. Unicode look-alikes are out with everything else that is not listed.
_SAFE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")
_DID: Final = re.compile(DID)
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_CHECKSUM: Final = re.compile(r"sha256:[0-9a-f]{64}")
_IMAGE: Final = re.compile(r"[a-z0-9][a-z0-9._/:-]{0,254}")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
RESERVED_NAMES: Final = frozenset({"algoCustomData.json"})
RESERVED_VARIABLES: Final = frozenset(
    {"DIDS", "TRANSFORMATION_DID", "VOLUME", "INPUTS", "OUTPUTS", "LOGS", "ALGO", "secret", "PATH", "HOME"}
)


@dataclass(frozen=True)
class Step:
    """One task. *after* names the steps that must be done first."""

    name: str
    stage: int
    phase: Phase
    after: tuple[str, ...]


@dataclass(frozen=True)
class PlannedInput:
    """
    One data set of a stage: files, or an asset to be looked up, or what another stage puts out; one of the three.
    *ddo* is what is known of it, if anything is.
    """

    id: str
    files: tuple[FileObject, ...] = field(repr=False, default=())
    stage: int | None = None
    remote: RemoteAsset | None = None
    ddo: Mapping[str, Any] | None = field(repr=False, default=None)


@dataclass(frozen=True)
class PlannedStage:
    """Everything the steps of one stage need, in plain values."""

    index: int
    environment: str
    depends_on: tuple[int, ...]
    inputs: tuple[PlannedInput, ...]
    algorithm_id: str | None
    algorithm_file: FileObject | None = field(repr=False)
    rawcode: str | None = field(repr=False)
    container: Container
    limits: Limits
    custom_data: Any = field(repr=False)
    variables: Mapping[str, str] = field(repr=False)
    publish_output: bool
    publish_algorithm_log: bool
    algorithm_remote: RemoteAsset | None = None
    """Where it is neither a file nor raw code."""
    algorithm_sha256: str | None = None
    """In lower case; anything else than this is not run."""
    network: bool = True
    """Whether the algorithm may have a network, if its environment has one to give."""
    handed_over: bool = False
    """Whether a stage that runs elsewhere reads what it puts out; also where nothing of that is published."""

    @property
    def dids(self) -> tuple[str, ...]:
        return tuple(folder_name(planned.id) for planned in self.inputs)


@dataclass(frozen=True)
class Plan:
    """What will be done for a job, in an order in which it can be done."""

    agreement_id: str
    owner: str
    stages: tuple[PlannedStage, ...]
    steps: tuple[Step, ...]
    whitelist: tuple[str, ...] = ()
    """Who may have the results beside the owner, as the last stage names them: addresses in lower case."""

    def stage(self, index: int) -> PlannedStage:
        return next(stage for stage in self.stages if stage.index == index)

    @property
    def environments(self) -> tuple[str, ...]:
        """Each once, that of the first stage first."""
        return tuple(dict.fromkeys(stage.environment for stage in self.stages))

    def part(self, index: int) -> Plan:
        """What a run that does nothing but stage *index* has to do: its steps wait for none of another stage."""
        own = {step.name for step in self.steps if step.stage == index}
        return replace(
            self,
            stages=(self.stage(index),),
            steps=tuple(
                replace(step, after=tuple(name for name in step.after if name in own))
                for step in self.steps
                if step.name in own
            ),
        )

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"agreement {self.agreement_id}, owner {self.owner}: {len(self.stages)} stage(s)"
        for stage in self.stages:
            limits = stage.limits
            yield ""
            waits = f", after stage {', '.join(map(str, stage.depends_on))}" if stage.depends_on else ""
            yield f"stage {stage.index} in {stage.environment}{waits}"
            for planned in stage.inputs:
                yield f"  input      {planned.id}: {_source(planned)}"
            code = f"by {_kind(stage.algorithm_file)}" if stage.algorithm_file else "raw code"
            if stage.algorithm_remote is not None:
                code = _REMOTE
            # Not the entrypoint: it is code, may hold what nobody else is to see, and this text goes into logs.
            yield f"  algorithm  {stage.algorithm_id or 'unnamed'} ({code}) for {stage.container.image}"
            yield (
                f"  limits     {limits.seconds:g} s, {limits.memory_bytes / GIB:g} GiB memory, "
                f"{limits.disk_bytes / GIB:g} GiB disk, {limits.cpus:g} cpu, {limits.gpus} gpu"
            )
            if not stage.network:
                yield "  network    none"
            publishes = [
                name
                for name, wanted in (("outputs", stage.publish_output), ("log", stage.publish_algorithm_log))
                if wanted
            ]
            yield f"  publishes  {' and '.join(publishes) or 'nothing'}"
            if stage.handed_over:
                yield "  hands over its outputs"
        yield ""
        width = max(len(step.name) for step in self.steps)
        for step in self.steps:
            yield f"{step.name:<{width}}  <-  {', '.join(step.after) or 'start'}"


_REMOTE: Final = "at another provider"


def _source(planned: PlannedInput) -> str:
    if planned.stage is not None:
        return f"stage {planned.stage}"
    return _REMOTE if planned.remote is not None else _counted(planned.files)


def _kind(file: FileObject) -> str:
    return "URL" if isinstance(file, UrlFile) else f"{file.type} file"


def _counted(files: Iterable[FileObject]) -> str:
    """How many of each kind, in the order they first appear."""
    return ", ".join(f"{count} {kind}(s)" for kind, count in Counter(map(_kind, files)).items())


def compile_plan(workflow: Workflow, offers: Mapping[str, Offer]) -> Plan:
    """
    Check what *workflow* means against the environments on *offers* (by id) and lay out its steps.

    Raises:
        InvalidWorkflow: Every problem found, each with its path in the document.

    Source: spec 000 "Create new job"; contract, section 4.
    """
    indexes = tuple(position if stage.index is None else stage.index for position, stage in enumerate(workflow.stages))
    if too_much := list(_size_problems(workflow)):
        # Not looked into further: what is checked below takes more than linear time.
        raise InvalidWorkflow(too_much)
    problems = [*_missing_problems(workflow), *_name_problems(workflow), *_index_problems(indexes)]
    dependencies = dict(zip(indexes, _dependencies(workflow.stages, indexes), strict=True))
    problems.extend(_dependency_problems(workflow.stages, indexes, dependencies))
    for position, stage in enumerate(workflow.stages):
        problems.extend(_stage_problems(f"stages.{position}", stage, offers))
    if problems:
        raise InvalidWorkflow(problems)
    by_index = dict(zip(indexes, workflow.stages, strict=True))
    order = _ordered(dependencies)
    read = _read_elsewhere(workflow.stages)
    stages = tuple(_planned(index, by_index[index], dependencies[index], offers, index in read) for index in order)
    return Plan(
        agreement_id=workflow.agreement_id,
        owner=workflow.owner,
        stages=stages,
        steps=tuple(step for stage in stages for step in _steps(stage)),
        whitelist=tuple(address.lower() for address in by_index[order[-1]].output.whitelist),
    )


def _read_elsewhere(stages: tuple[Stage, ...]) -> set[int]:
    """The stages whose outputs another flow run reads: with several environments each stage is one of its own."""
    if len({stage.compute.namespace for stage in stages}) == 1:
        return set()
    return {part.stage for stage in stages for part in stage.input if part.stage is not None}


def _ordered(dependencies: Mapping[int, tuple[int, ...]]) -> list[int]:
    """Topological, lowest index first among those that could go next: the same document, the same plan."""
    sorter = TopologicalSorter(dependencies)
    sorter.prepare()
    order: list[int] = []
    ready: list[int] = []
    while sorter.is_active():
        ready.extend(sorter.get_ready())
        ready.sort(reverse=True)
        index = ready.pop()
        order.append(index)
        sorter.done(index)
    return order


def _steps(stage: PlannedStage) -> Iterator[Step]:
    def name(phase: Phase, index: int = stage.index) -> str:
        return f"{index}/{phase}"

    done_before = tuple(name(Phase.PUBLISH, index) for index in stage.depends_on)
    yield Step(name(Phase.DATA), stage.index, Phase.DATA, done_before)
    yield Step(name(Phase.ALGORITHM), stage.index, Phase.ALGORITHM, done_before)
    yield Step(name(Phase.RUN), stage.index, Phase.RUN, (name(Phase.DATA), name(Phase.ALGORITHM)))
    yield Step(name(Phase.FILTER), stage.index, Phase.FILTER, (name(Phase.RUN),))
    yield Step(name(Phase.PUBLISH), stage.index, Phase.PUBLISH, (name(Phase.FILTER),))


def _planned(
    index: int, stage: Stage, depends_on: tuple[int, ...], offers: Mapping[str, Offer], handed_over: bool
) -> PlannedStage:
    offer = offers[stage.compute.namespace]
    asked = stage.compute.resources
    algorithm = stage.algorithm
    return PlannedStage(
        index=index,
        environment=offer.id,
        depends_on=depends_on,
        inputs=tuple(
            PlannedInput(
                id=_input_id(part),
                files=_files(part),
                stage=part.stage,
                remote=_remote(part.id, part.remote, stage.output.metadata_uri) if part.remote else None,
                ddo=part.ddo,
            )
            for part in _in_order(stage.input)
        ),
        algorithm_id=algorithm.id,
        algorithm_file=_algorithm_file(algorithm),
        rawcode=None if _algorithm_file(algorithm) else algorithm.rawcode,
        container=algorithm.container,
        limits=offer.limits.capped(
            seconds=stage.compute.maxtime,
            memory_bytes=_bytes(asked.ram),
            disk_bytes=_bytes(asked.disk),
            cpus=asked.cpu,
            gpus=0 if asked.gpu is None else asked.gpu,
        ),
        custom_data=algorithm.algocustomdata,
        variables=dict(algorithm.envs or {}),
        publish_output=stage.output.publish_output,
        publish_algorithm_log=stage.output.publish_algorithm_log,
        algorithm_remote=_algorithm_remote(stage),
        algorithm_sha256=algorithm.sha256,
        network=stage.compute.network is not False,
        handed_over=handed_over,
    )


def _files(part: Input) -> tuple[FileObject, ...]:
    return part.files or tuple(UrlFile(url=url) for url in part.url)


def _algorithm_file(algorithm: Algorithm) -> FileObject | None:
    return algorithm.file or (UrlFile(url=algorithm.url) if algorithm.url else None)


def _remote(did: str | None, remote: Remote, metadata_uri: str | None, userdata: Any = None) -> RemoteAsset:
    return RemoteAsset(
        did=did or "",
        service_id=remote.service_id,
        tx_id=remote.tx_id,
        userdata=remote.userdata or userdata or {},
        metadata_url=metadata_uri or "",
    )


def _algorithm_remote(stage: Stage) -> RemoteAsset | None:
    algorithm = stage.algorithm
    if algorithm.remote is None or _algorithm_file(algorithm) or algorithm.rawcode:
        return None
    return _remote(algorithm.id, algorithm.remote, stage.output.metadata_uri, algorithm.algouserdata)


def _bytes(gibibytes: float | None) -> int | None:
    return None if gibibytes is None else max(1, int(gibibytes * GIB))


def _in_order(inputs: tuple[Input, ...]) -> list[Input]:
    """By their index where they have one; the order of the document otherwise."""
    return [
        part
        for _, _, part in sorted(((n if part.index is None else part.index), n, part) for n, part in enumerate(inputs))
    ]


def _input_id(part: Input) -> str:
    return part.id or f"stage-{part.stage}"


def _dependencies(stages: tuple[Stage, ...], indexes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    ordered = sorted(set(indexes))
    for stage, index in zip(stages, indexes, strict=True):
        named = {part.stage for part in stage.input if part.stage is not None}
        before = [other for other in ordered if other < index]
        if stage.depends_on is not None:
            yield tuple(sorted(set(stage.depends_on)))
        elif named:
            yield tuple(sorted(named))
        else:
            yield tuple(before[-1:])


def _missing_problems(workflow: Workflow) -> Iterator[Problem]:
    for name, given in (
        ("agreementId", workflow.agreement_id),
        ("owner", workflow.owner),
        ("stages", workflow.stages),
    ):
        if not given:
            yield Problem(name, REQUIRED)


def _size_problems(workflow: Workflow) -> Iterator[Problem]:
    if len(workflow.stages) > MAX_STAGES:
        yield Problem("stages", f"{len(workflow.stages)} stages; at most {MAX_STAGES}")
    inputs = sum(len(part.url) + len(part.files) or 1 for stage in workflow.stages for part in stage.input)
    if inputs > MAX_URLS:
        yield Problem("stages", f"{inputs} inputs, URLs and files in all; at most {MAX_URLS}")


def _name_problems(workflow: Workflow) -> Iterator[Problem]:
    """Ids and variables reach the algorithm as environment variables, and Linux takes no string beyond 128 KiB."""
    ids = sum(len(_input_id(part)) + 4 for stage in workflow.stages for part in stage.input)
    if ids > LONGEST_VARIABLE:
        yield Problem("stages", f"the ids of all inputs have {ids} characters together; at most {LONGEST_VARIABLE}")


def _index_problems(indexes: tuple[int, ...]) -> Iterator[Problem]:
    seen: set[int] = set()
    for position, index in enumerate(indexes):
        if index in seen:
            yield Problem(f"stages.{position}.index", f"index {index} is used by another stage too")
        seen.add(index)


def _dependency_problems(
    stages: tuple[Stage, ...], indexes: tuple[int, ...], dependencies: Mapping[int, tuple[int, ...]]
) -> Iterator[Problem]:
    known = set(indexes)
    for position, (stage, index) in enumerate(zip(stages, indexes, strict=True)):
        for n, named in enumerate(stage.depends_on or ()):
            if named not in known:
                yield Problem(f"stages.{position}.dependsOn.{n}", f"there is no stage {named}")
        ancestors = _ancestors(index, dependencies)
        for n, part in enumerate(stage.input):
            if part.stage is None:
                continue
            path = f"stages.{position}.input.{n}.stage"
            if part.stage not in known:
                yield Problem(path, f"there is no stage {part.stage}")
            elif part.stage not in ancestors:
                yield Problem(path, f"stage {part.stage} is not among the stages this one depends on")
    graph = {index: {d for d in after if d in known} for index, after in dependencies.items()}
    while members := _cycle(graph):
        position = indexes.index(members[0])
        yield Problem(f"stages.{position}.dependsOn", f"stages wait for each other: {' -> '.join(map(str, members))}")
        graph[members[0]].discard(members[1])  # and on to the next


def _cycle(graph: Mapping[int, set[int]]) -> list[int]:
    """One cycle, each member waiting for the one after it, the first of them again at the end; empty if none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        return list(reversed(cycle.args[1]))
    return []


def _ancestors(index: int, dependencies: Mapping[int, tuple[int, ...]]) -> set[int]:
    found: set[int] = set()
    todo = list(dependencies.get(index, ()))
    while todo:
        other = todo.pop()
        if other not in found:
            found.add(other)
            todo.extend(dependencies.get(other, ()))
    return found


def _stage_problems(path: str, stage: Stage, offers: Mapping[str, Offer]) -> Iterator[Problem]:
    missing = [part for part in PARTS if part not in stage.model_fields_set]
    for part in missing:
        yield Problem(f"{path}.{part}", REQUIRED)
    offer = offers.get(stage.compute.namespace)
    if "compute" not in missing:
        yield from _compute_problems(f"{path}.compute", stage.compute, offers)
    names: dict[str, int] = {}
    for n, given in enumerate(stage.input):
        here = f"{path}.input.{n}"
        yield from _input_problems(here, given, offer)
        name = folder_name(_input_id(given)) if given.id or given.stage is not None else ""
        if name and names.setdefault(name, n) != n:
            yield Problem(f"{here}.id", f"input {names[name]} has this id too")
    if "algorithm" not in missing:
        yield from _algorithm_problems(f"{path}.algorithm", stage.algorithm, offer)
    if any(given.remote for given in stage.input) or _algorithm_remote(stage) is not None:
        yield from _metadata_problems(f"{path}.output.metadataUri", stage.output.metadata_uri)


def _metadata_problems(path: str, uri: str | None) -> Iterator[Problem]:
    if not uri:
        yield Problem(path, "name the metadata store in which remote assets are to be looked up")
        return
    try:
        check_url(uri, HTTP)
    except ForbiddenUrl as refused:
        yield Problem(path, refused.reason)


def _remote_problems(path: str, did: str | None, remote: Remote) -> Iterator[Problem]:
    """*path* is that of the input or algorithm, which has the asset's *did* as its id."""
    if did and not _DID.fullmatch(did):
        yield Problem(f"{path}.id", "must be the DID of the remote asset: did:op: and letters, digits, _ and -")
    if not remote.service_id:
        yield Problem(f"{path}.remote.serviceId", REQUIRED)
    if remote.userdata is not None and not isinstance(remote.userdata, Mapping):
        yield Problem(f"{path}.remote.userdata", "must be an object")


def _compute_problems(path: str, compute: Compute, offers: Mapping[str, Offer]) -> Iterator[Problem]:
    offer = offers.get(compute.namespace)
    if not compute.namespace:
        yield Problem(f"{path}.namespace", f"name a compute environment: {_names(offers)}")
    elif offer is None:
        yield Problem(f"{path}.namespace", f"no such compute environment; there is {_names(offers) or 'none'}")
    if compute.instances != 1:
        yield Problem(f"{path}.Instances", "only one instance of an algorithm is run")
    if offer is not None and (compute.resources.gpu or 0) > offer.limits.gpus:
        yield Problem(
            f"{path}.resources.gpu",
            f"asks for {compute.resources.gpu} GPU(s); the environment has {offer.limits.gpus}",
        )


def _names(offers: Mapping[str, Offer]) -> str:
    return ", ".join(sorted(offers))


def _input_problems(path: str, part: Input, offer: Offer | None) -> Iterator[Problem]:
    sources = ("url", "files", "remote", "stage")
    given = [name for name in sources if getattr(part, name) not in (None, ())]
    if len(given) != 1:
        yield Problem(path, f"give one of {', '.join(sources)}; {' and '.join(given) or 'none'} is given")
    if part.remote is not None:
        yield from _remote_problems(path, part.id, part.remote)
    if not part.id:
        if part.stage is None:
            yield Problem(f"{path}.id", REQUIRED)
    elif not _SAFE_ID.fullmatch(part.id) or not _SAFE_ID.fullmatch(folder_name(part.id)) or ".." in part.id:
        yield Problem(f"{path}.id", "is no safe name: letters, digits, '.', '_', ':' and '-' only, at most 200 of them")
    elif folder_name(part.id) in RESERVED_NAMES:
        yield Problem(f"{path}.id", "is a reserved name")
    for n, url in enumerate(part.url):
        yield from _file_problems(f"{path}.url.{n}", UrlFile(url=url), offer)
    for n, file in enumerate(part.files):
        yield from _file_problems(f"{path}.files.{n}", file, offer)


def _file_problems(path: str, file: FileObject, offer: Offer | None) -> Iterator[Problem]:
    """What its text tells, never quoting it: it is its owner's secret, and this text reaches logs and screens."""
    if isinstance(file, UrlFile | GraphqlFile):
        try:
            check_request(file, offer.fetch.schemes if offer is not None else None)
        except ForbiddenUrl as refused:
            yield Problem(path, refused.reason)


def _algorithm_problems(path: str, algorithm: Algorithm, offer: Offer | None) -> Iterator[Problem]:
    given = algorithm.file or algorithm.url or algorithm.rawcode
    if algorithm.remote is not None and not given:
        if not algorithm.id:
            yield Problem(f"{path}.id", REQUIRED)
        yield from _remote_problems(path, algorithm.id, algorithm.remote)
        if algorithm.algouserdata is not None and not isinstance(algorithm.algouserdata, Mapping):
            yield Problem(f"{path}.algouserdata", "must be an object")
    elif not given:
        yield Problem(path, "give url or rawcode")
    if algorithm.url:
        yield from _file_problems(f"{path}.url", UrlFile(url=algorithm.url), offer)
    if algorithm.file is not None:
        yield from _file_problems(f"{path}.file", algorithm.file, offer)
    if algorithm.rawcode and len(algorithm.rawcode.encode("utf-8", "surrogatepass")) > MAX_RAWCODE:
        yield Problem(f"{path}.rawcode", f"is longer than {MAX_RAWCODE} bytes; give url")
    if algorithm.id and (not _SAFE_ID.fullmatch(algorithm.id) or ".." in algorithm.id):
        yield Problem(f"{path}.id", "is no safe name: letters, digits, '.', '_', ':' and '-' only")
    yield from _container_problems(f"{path}.container", algorithm.container)
    for name in algorithm.envs or {}:
        if not _VARIABLE.fullmatch(name) or "\x00" in (algorithm.envs or {})[name]:
            yield Problem(f"{path}.envs", "has a name or value that is no environment variable")
        elif name in RESERVED_VARIABLES:
            yield Problem(f"{path}.envs.{name}", "is set by the service")
        elif len((algorithm.envs or {})[name].encode()) > LONGEST_VARIABLE:
            yield Problem(f"{path}.envs.{name}", f"has more than {LONGEST_VARIABLE} bytes; give it in algocustomdata")


def _container_problems(path: str, container: Container) -> Iterator[Problem]:
    if not container.entrypoint.strip():
        yield Problem(f"{path}.entrypoint", "is required, for example: python3 $ALGO")
    elif "\x00" in container.entrypoint:
        yield Problem(f"{path}.entrypoint", "has a NUL character")
    if not _IMAGE.fullmatch(container.image):
        yield Problem(f"{path}.image", "is required and must be the name of a container image")
    if not _TAG.fullmatch(container.tag):
        yield Problem(f"{path}.tag", "is no tag of a container image")
    if container.checksum and not _CHECKSUM.fullmatch(container.checksum):
        yield Problem(f"{path}.checksum", "must be sha256: and 64 hex digits")
