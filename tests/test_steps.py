"""Which steps count as done: keys that follow what a step depends on, and results that hold only with their files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

import pytest
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore

from blocks.environment import ComputeEnvironment
from blocks.limits import FilterLimits
from flows.plan import Plan
from flows.steps import settle, step_keys
from tasks.workspace import Workspace, stage_workspace, steps_folder
from tests.documents import data, offer, outputs_of, planned, stage

JOB: Final = "0123456789abcdef" * 2
OF_STAGE: Final = ("provision-data", "provision-algorithm", "run", "filter", "publish")


def secret_of(name: bytes) -> str:
    return hashlib.sha256(name).hexdigest()


def environment(root: Path = Path("/nowhere"), **more: Any) -> dict[str, ComputeEnvironment]:
    return {"default": ComputeEnvironment(offer=offer(**more), work_pool="tests", workspace=str(root))}


def environment_with(**more: Any) -> dict[str, ComputeEnvironment]:
    return {"default": ComputeEnvironment(offer=offer(), work_pool="tests", workspace="/nowhere", **more)}


def two_stages(first: dict[str, Any] | None = None, **second: Any) -> Plan:
    return planned(
        stage(0, **{"input": [data("a")], **(first or {})}),
        stage(1, **{"input": [outputs_of(0), data("b")], **second}),
    )


def names(stage: int, *phases: str) -> set[str]:
    return {f"{stage}/{phase}" for phase in phases or OF_STAGE}


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        (
            {"input": [data("a", "https://example.com/other.csv")]},
            names(0, "provision-data", "run", "filter", "publish"),
        ),
        ({"algorithm": {"algocustomdata": 1}}, names(0, "provision-data", "run", "filter", "publish")),
        ({"rawcode": "print(2)"}, names(0, "provision-algorithm", "run", "filter", "publish")),
        ({"url": "https://example.com/a.py"}, names(0, "provision-algorithm", "run", "filter", "publish")),
        ({"entrypoint": "sh $ALGO"}, names(0, "run", "filter", "publish")),
        ({"algorithm": {"envs": {"A": "1"}}}, names(0, "run", "filter", "publish")),
        ({"compute": {"maxtime": 5}}, names(0, "run", "filter", "publish")),
        ({"output": {"publishoutput": False}}, names(0, "publish")),
        ({"output": {"metadataUri": "https://example.com"}}, set()),
    ],
    ids=["URL", "parameters", "code", "URL of code", "entrypoint", "variable", "limit", "publication", "nothing"],
)
def test_a_change_means_what_it_touches_and_all_that_follows(change: dict[str, Any], redone: Collection[str]) -> None:
    """Nothing else of the stage is done again; of the stages after it, everything."""
    before, after = (step_keys(two_stages(first), environment(), secret_of) for first in (None, change))
    assert (set(redone) | names(1) if redone else set()) == {name for name in before if before[name] != after[name]}


def test_a_change_leaves_what_came_before_it() -> None:
    """Of a change in the second stage the first learns nothing."""
    before = step_keys(two_stages(), environment(), secret_of)
    after = step_keys(two_stages(rawcode="print(2)"), environment(), secret_of)
    assert {f"1/{phase}" for phase in OF_STAGE[1:]} == {name for name in before if before[name] != after[name]}


IMAGE: Final = {"container": {"image": "other", "tag": "1", "entrypoint": "python3 $ALGO"}}


@pytest.mark.parametrize(
    ("runner", "redone"),
    [("process", names(0, "run", "filter", "publish")), ("docker", names(0, *OF_STAGE[1:]))],
)
def test_an_image_comes_with_the_algorithm(runner: str, redone: Collection[str]) -> None:
    """Where it means anything another image is got again, by the step that gets the algorithm."""
    site = environment_with(runner=runner)
    before, after = (step_keys(two_stages(first), site, secret_of) for first in (None, {"algorithm": IMAGE}))
    assert set(redone) | names(1) == {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    "change", [{"docker_runtime": "runsc"}, {"docker_network": "other"}, {"scratch_bytes": 1}], ids=str
)
def test_what_a_container_is_like_rules_its_run(change: dict[str, Any]) -> None:
    """An operator's change of it is a reason to run again, and none to fetch again."""
    before, after = (
        step_keys(two_stages(), environment_with(runner="docker", **more), secret_of) for more in ({}, change)
    )
    assert names(0, "run", "filter", "publish") | names(1) == {n for n in before if before[n] != after[n]}


def test_what_was_handed_over_anew_is_read_anew() -> None:
    """A stage that was run once more may have put out something else, though nothing it depends on has changed."""
    before, after = (
        step_keys(two_stages(), environment(), secret_of, received) for received in ({0: "one"}, {0: "other"})
    )
    assert names(1, "provision-data", "run", "filter", "publish") == {n for n in before if before[n] != after[n]}
    assert before != step_keys(two_stages(), environment(), secret_of)


def test_how_an_image_is_got_rules_nothing() -> None:
    """Credentials and policy decide whether there is an image, not which."""
    before = step_keys(two_stages(), environment_with(runner="docker"), secret_of)
    more = {"pull": "always", "registries": {"docker.io": {"username": "u", "password": "p"}}}
    assert before == step_keys(two_stages(), environment_with(runner="docker", **more), secret_of)


def test_a_change_of_what_may_leave_asks_the_filter_again() -> None:
    """An operator's new limit holds for outputs that are there already."""
    before = step_keys(two_stages(), environment(), secret_of)
    after = step_keys(two_stages(), environment(filter=FilterLimits(files=1)), secret_of)
    assert names(0, "filter", "publish") | names(1) == {name for name in before if before[name] != after[name]}


def test_keys_are_file_names_that_tell_nothing() -> None:
    """Prefect's database has them in paths of results, and a plain hash of a short secret can be found by trying."""
    told: list[bytes] = []

    def remember(content: bytes) -> str:
        told.append(content)
        return f"{len(told)}"

    keys = step_keys(planned(stage(algorithm={"algocustomdata": "hunter2"})), environment(), remember)
    assert ["0-provision-data-1", "0-provision-algorithm-2", "0-run-3", "0-filter-4", "0-publish-5"] == [*keys.values()]
    assert b"hunter2" in told[0]


@pytest.fixture
def job(tmp_path: Path) -> Callable[[Plan, Collection[str]], frozenset[str]]:
    """Lays out a job of which the named steps have results and all steps have left files; returns what is settled."""

    def make(plan: Plan, with_results: Collection[str]) -> frozenset[str]:
        keys = step_keys(plan, environment(tmp_path), secret_of)
        store = ResultStore(result_storage=LocalFileSystem(basepath=str(steps_folder(tmp_path, JOB))))
        for name in with_results:
            store.write("done", key=keys[name])
        for number in (0, 1, 2):
            workspace = stage_workspace(tmp_path, JOB, number)
            workspace.create()
            for file in (workspace.inputs / "f", workspace.algorithm, workspace.outputs / "f", workspace.algorithm_log):
                file.touch()
        return settle(plan, JOB, keys, environment(tmp_path))

    return make


def left(workspace: Workspace) -> set[str]:
    return {path.name for path in workspace.root.rglob("*") if path.is_file()}


def test_only_files_of_finished_steps_are_left(tmp_path: Path, job: Callable[..., frozenset[str]]) -> None:
    """What an unfinished step has begun goes, whole stages that are no more go, and so do results nobody asks for."""
    plan = two_stages()
    (steps_folder(tmp_path, JOB)).mkdir(parents=True)
    (steps_folder(tmp_path, JOB) / "0-run-of-another-document").write_text("{}")
    done = names(0) | names(1, "provision-algorithm")
    assert done == job(plan, done)
    assert {"f", "algorithm", "algorithm.log"} == left(stage_workspace(tmp_path, JOB, 0))
    assert {"algorithm"} == left(stage_workspace(tmp_path, JOB, 1))
    assert not (tmp_path / JOB / "2").exists()
    assert len(done) == len(list(steps_folder(tmp_path, JOB).iterdir()))


def test_logs_of_what_was_stopped_stay_until_the_next_try(tmp_path: Path, job: Callable[..., frozenset[str]]) -> None:
    """They are all that tells what an algorithm was at; what it has put out goes at once."""
    plan = two_stages()
    keys = step_keys(plan, environment(tmp_path), secret_of)
    job(plan, names(0))
    workspace = stage_workspace(tmp_path, JOB, 1)
    workspace.create()
    for file in (workspace.outputs / "f", workspace.logs / "own", workspace.algorithm_log):
        file.touch()
    settle(plan, JOB, keys, environment(tmp_path), logs=True)
    assert {"own", "algorithm.log"} == left(workspace)
    settle(plan, JOB, keys, environment(tmp_path))
    assert set() == left(workspace)


def test_a_step_is_done_only_after_those_before_it(tmp_path: Path, job: Callable[..., frozenset[str]]) -> None:
    """A document that was changed and changed back finds nothing of what the change in between has overwritten."""
    plan = two_stages()
    assert names(0, "provision-data") == job(plan, names(0, "provision-data", "run", "filter", "publish") | names(1))
    assert {"f"} == left(stage_workspace(tmp_path, JOB, 0))
    assert set() == left(stage_workspace(tmp_path, JOB, 1))


def test_a_result_that_was_cut_off_does_not_count(tmp_path: Path, job: Callable[..., frozenset[str]]) -> None:
    """Prefect does not write them at once or not at all."""
    plan = two_stages()
    job(plan, names(0))
    result = steps_folder(tmp_path, JOB) / step_keys(plan, environment(tmp_path), secret_of)["0/publish"]
    result.write_bytes(result.read_bytes()[:20])
    keys = step_keys(plan, environment(tmp_path), secret_of)
    assert names(0) - {"0/publish"} == settle(plan, JOB, keys, environment(tmp_path))


def test_what_is_gone_from_the_store_is_published_again(tmp_path: Path, job: Callable[..., frozenset[str]]) -> None:
    """Unless nobody can tell."""
    plan = two_stages()
    job(plan, names(0))
    keys = step_keys(plan, environment(tmp_path), secret_of)
    assert names(0) == settle(plan, JOB, keys, environment(tmp_path), None)
    assert names(0) - {"0/publish"} == settle(plan, JOB, keys, environment(tmp_path), [1])
