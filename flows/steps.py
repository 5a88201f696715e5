"""
Which steps of a job are done, so that they are not done again when it is restarted or was cut off.

Prefect does the remembering: the result of a step's task is persisted under the step's key, and a task whose key has
a result is not run (its state is then ``Cached``). What is left to do here is to make the keys, and to see to it that
a result is there only while it holds: the files a step has made lie beside it, in one folder of its stage, and are
overwritten by the next one that makes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from pydantic_core import to_jsonable_python

from blocks.environment import ComputeEnvironment
from flows.plan import Plan, PlannedStage
from flows.status import Phase
from tasks.workspace import Workspace, remove, stage_workspace, steps_folder

_ALGORITHM: Final = frozenset({"algorithm_id", "algorithm_file", "rawcode", "container", "variables", "limits"})
_PUBLICATION: Final = frozenset({"publish_output", "publish_algorithm_log", "handed_over"})
_DATA: Final = frozenset({"inputs", "custom_data"})

# What of a stage a step has nothing to do with. A field that is not named here counts: a step done once too often is
# better than one that should have been.
_WITHOUT_MEANING: Final[Mapping[Phase, frozenset[str]]] = {
    Phase.DATA: _ALGORITHM | _PUBLICATION | {"depends_on"},
    Phase.ALGORITHM: _DATA | _PUBLICATION | {"depends_on", "container", "variables", "limits"},
    Phase.RUN: _PUBLICATION | {"depends_on"},
    Phase.FILTER: _DATA | _ALGORITHM | _PUBLICATION | {"depends_on"},
    Phase.PUBLISH: _DATA | _ALGORITHM | {"depends_on"},
}


def step_keys(
    plan: Plan,
    environments: Mapping[str, ComputeEnvironment],
    secret_of: Callable[[bytes], str],
    received: Mapping[int, str] = MappingProxyType({}),
) -> dict[str, str]:
    """
    The key of every step, by its name: the same as long as what the step depends on in the plan, in its environment
    and in the steps before it is the same. A key is a file name.

    *secret_of* makes a text from bytes that nobody else can make: a plain hash would give a short secret away.
    *received* has a checksum of what each stage has handed over, where that is known: a stage that was run once more
    may have put out something else.
    """
    keys: dict[str, str] = {}
    for step in plan.steps:
        stage = plan.stage(step.stage)
        said = {
            "step": step.name,
            "stage": _described(stage, step.phase),
            "environment": _ruling(environments[stage.environment], stage, step.phase),
            "after": [keys[name] for name in step.after],
        }
        if step.phase is Phase.DATA and (read := _read(stage, received)):
            said["received"] = read
        text = json.dumps(said, sort_keys=True, separators=(",", ":"))
        keys[step.name] = f"{step.stage}-{step.phase}-{secret_of(text.encode())}"
    return keys


def _read(stage: PlannedStage, received: Mapping[int, str]) -> list[str]:
    return [received[part.stage] for part in stage.inputs if part.stage is not None and part.stage in received]


def _described(stage: PlannedStage, phase: Phase) -> dict[str, Any]:
    return {
        field.name: to_jsonable_python(getattr(stage, field.name))
        for field in fields(stage)
        if field.name not in _WITHOUT_MEANING[phase]
    }


def _ruling(environment: ComputeEnvironment, stage: PlannedStage, phase: Phase) -> Any:
    """What of an environment decides how a step ends, beside what the plan has from it."""
    match phase:
        case Phase.DATA:
            return None
        case Phase.ALGORITHM:
            return _image(environment, stage)
        case Phase.RUN:
            folders = [str(path) for path in (*environment.system, *environment.path)]
            said: list[Any] = [environment.offer.network, environment.runner, environment.allow_unsandboxed, folders]
            if environment.runner == "docker":
                said += [environment.docker_runtime, environment.docker_network, environment.scratch_bytes]
            return said
        case Phase.FILTER:
            return environment.offer.filter.model_dump(mode="json")
        case Phase.PUBLISH:
            return environment.results


def _image(environment: ComputeEnvironment, stage: PlannedStage) -> Any:
    """What the algorithm will run in, where that is got together with the algorithm."""
    if environment.runner == "process":
        return [environment.runner]
    container = stage.container
    return [environment.runner, environment.docker_host, container.image, container.tag, container.checksum]


def settle(
    plan: Plan,
    job_id: str,
    keys: Mapping[str, str],
    environments: Mapping[str, ComputeEnvironment],
    published: Collection[int] | None = None,
    *,
    logs: bool = False,
) -> frozenset[str]:
    """
    Keep of a job's folder what its finished steps have made, and remove all else: what others have begun, and what
    was made for another document. To be called when no step is running.

    A step has finished if its result is there and all steps before it have. *published* are the stages whose part is
    in the store, if that is known: the result of a publication that is gone from there counts for nothing. With *logs*
    those stay that the steps which have not finished have left, until the next time.

    Returns:
        The names of the finished steps.
    """
    done: set[str] = set()
    for step in plan.steps:
        root = environments[plan.stage(step.stage).environment].workspace_root()
        gone = step.phase is Phase.PUBLISH and published is not None and step.stage not in published
        if not gone and done.issuperset(step.after) and _has_result(root, job_id, keys[step.name]):
            done.add(step.name)
    for root in {environments[stage.environment].workspace_root() for stage in plan.stages}:
        # The results before the files: were this cut off in between, a step must not seem to have finished.
        remove(*_results_but(root, job_id, {keys[name] for name in done}))
        remove(*_stages_but(root, job_id, {str(stage.index) for stage in plan.stages}))
    for stage in plan.stages:
        remove(*_made_by_others(stage, stage_workspace(_root(stage, environments), job_id, stage.index), done, logs))
    return frozenset(done)


def _root(stage: PlannedStage, environments: Mapping[str, ComputeEnvironment]) -> Path:
    return environments[stage.environment].workspace_root()


def _has_result(root: Path, job_id: str, key: str) -> bool:
    """Whether Prefect would find it. One that was cut off while it was written does not count."""
    folder = steps_folder(root, job_id)
    return (folder / key).is_file() and ResultStore(result_storage=LocalFileSystem(basepath=str(folder))).exists(key)


def _results_but(root: Path, job_id: str, kept: Collection[str]) -> list[Path]:
    folder = steps_folder(root, job_id)
    return [path for path in folder.iterdir() if path.name not in kept] if folder.is_dir() else []


def _stages_but(root: Path, job_id: str, kept: Collection[str]) -> list[Path]:
    folder = root / job_id
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if path.name.isdecimal() and path.name not in kept]


def _made_by_others(stage: PlannedStage, workspace: Workspace, done: Collection[str], logs: bool) -> list[Path]:
    """
    What the steps of a stage that are not done make; with *logs* all but theirs. Inputs from here are links to another
    stage's outputs, which the filter would take for links that lead outside: so they are gone before it looks again.
    """
    made_by: Mapping[Phase, list[Path]] = {
        Phase.DATA: [workspace.inputs, workspace.ddos],
        Phase.ALGORITHM: [workspace.algorithm.parent],
        Phase.RUN: [workspace.outputs, workspace.logs, workspace.algorithm_log, workspace.configuration_log],
        Phase.FILTER: [workspace.filtering_log],
        Phase.PUBLISH: [workspace.publish_log],
    }
    kept = workspace.all_logs if logs else ()
    found = [path for phase, made in made_by.items() if f"{stage.index}/{phase}" not in done for path in made]
    return [path for path in found if path not in kept]
