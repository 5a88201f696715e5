"""From a document to a plan: every problem at once, or the steps in an order in which they can be done."""

from __future__ import annotations

from copy import deepcopy
from itertools import combinations
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.assets import RemoteAsset
from blocks.files import ArweaveFile, UrlFile
from blocks.limits import GIB, FetchLimits, Limits, Offer
from flows.errors import InvalidWorkflow
from flows.jobs import document_digest, summary_of
from flows.plan import MAX_RAWCODE, MAX_STAGES, MAX_URLS, RESERVED_VARIABLES, Plan, compile_plan
from flows.status import Phase
from flows.workflow import parse_workflow
from tests.documents import data, files, offer, outputs_of, parsed, planned, stage, workflow

MARKER: Final = "hush-81e0c9d4"
OFFERS: Final = {
    "default": offer(limits=Limits(seconds=100, memory_bytes=4 * GIB, disk_bytes=8 * GIB, cpus=2, gpus=1)),
    "buckets": offer("buckets", fetch=FetchLimits(schemes=("https", "s3"))),
}


STORE: Final = {"metadataUri": "https://store.example"}
REMOTE: Final = {"txId": "0x1", "serviceId": "2"}
GRAPHQL: Final = {"type": "graphql", "url": "https://a.example/graphql", "query": "{ a }"}


def problems(*stages: dict[str, Any], offers: dict[str, Offer] | None = None) -> list[str]:
    with pytest.raises(InvalidWorkflow) as refusal:
        compile_plan(parse_workflow(workflow(stages=list(stages))), OFFERS if offers is None else offers)
    return [str(problem) for problem in refusal.value.problems]


def paths(*stages: dict[str, Any]) -> list[str]:
    return [line.split(":", 1)[0] for line in problems(*stages)]


def order(plan: Plan) -> list[int]:
    return [stage.index for stage in plan.stages]


def depends(plan: Plan) -> dict[int, tuple[int, ...]]:
    return {stage.index: stage.depends_on for stage in plan.stages}


# What is wrong with a document.


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (stage(environment=""), "compute.namespace: name a compute environment: buckets, default"),
        (stage(environment="moon"), "compute.namespace: no such compute environment; there is buckets, default"),
        (stage(compute={"Instances": 2}), "compute.Instances: only one instance of an algorithm is run"),
        (stage(compute={"Instances": 0}), "compute.Instances: only one instance of an algorithm is run"),
        (
            stage(compute={"resources": {"gpu": 2}}),
            "compute.resources.gpu: asks for 2 GPU(s); the environment has 1",
        ),
        (stage(input=[{"id": "a"}]), "input.0: give one of url, files, remote, stage; none is given"),
        (
            stage(input=[{"id": "did:op:a", "remote": REMOTE}]),
            "output.metadataUri: name the metadata store in which remote assets are to be looked up",
        ),
        (
            stage(input=[{"id": "did:op:a", "remote": REMOTE}], output={"metadataUri": "https://a:b@c"}),
            "output.metadataUri: it carries credentials",
        ),
        (
            stage(input=[{"id": "a", "remote": REMOTE}], output=STORE),
            "input.0.id: must be the DID of the remote asset: did:op: and letters, digits, _ and -",
        ),
        (
            stage(input=[{"id": "did:op:a", "remote": {"txId": "0x1"}}], output=STORE),
            "input.0.remote.serviceId: is required",
        ),
        (
            stage(input=[{"id": "did:op:a", "remote": {**REMOTE, "userdata": [1]}}], output=STORE),
            "input.0.remote.userdata: must be an object",
        ),
        (stage(input=[data("")]), "input.0.id: is required"),
        (stage(input=[data("a"), data("did:op:a")]), "input.1.id: input 0 has this id too"),
        (stage(input=[data("did:op:algoCustomData.json")]), "input.0.id: is a reserved name"),
        (stage(rawcode=None), "algorithm: give url or rawcode"),
        (stage(rawcode=""), "algorithm: give url or rawcode"),
        (stage(rawcode=None, algorithm={"remote": REMOTE}, output=STORE), "algorithm.id: is required"),
        (
            stage(rawcode=None, algorithm={"id": "did:op:a", "remote": REMOTE}),
            "output.metadataUri: name the metadata store in which remote assets are to be looked up",
        ),
        (
            stage(rawcode=None, algorithm={"id": "did:op:a", "remote": REMOTE, "algouserdata": 7}, output=STORE),
            "algorithm.algouserdata: must be an object",
        ),
        (
            stage(rawcode="é" * (MAX_RAWCODE // 2 + 1)),
            f"algorithm.rawcode: is longer than {MAX_RAWCODE} bytes; give url",
        ),
        (
            stage(algorithm={"id": "../a"}),
            "algorithm.id: is no safe name: letters, digits, '.', '_', ':' and '-' only",
        ),
        (stage(entrypoint=" "), "algorithm.container.entrypoint: is required, for example: python3 $ALGO"),
        (stage(entrypoint="a\x00b"), "algorithm.container.entrypoint: has a NUL character"),
        (
            stage(algorithm={"envs": {"A-B": "1"}}),
            "algorithm.envs: has a name or value that is no environment variable",
        ),
        (
            stage(algorithm={"envs": {"A\n": "1"}}),
            "algorithm.envs: has a name or value that is no environment variable",
        ),
        (
            stage(algorithm={"envs": {"A": "\x00"}}),
            "algorithm.envs: has a name or value that is no environment variable",
        ),
    ],
)
def test_a_problem_and_its_path(broken: dict[str, Any], problem: str) -> None:
    """Each thing that can be wrong with a stage is named with where it stands, and nothing else is."""
    assert [f"stages.0.{problem}"] == problems(broken)


@pytest.mark.parametrize(
    ("container", "part"),
    [
        ({}, "image"),
        ({"image": "UPPER"}, "image"),
        ({"image": "a b"}, "image"),
        ({"image": "-x"}, "image"),
        ({"image": "python", "tag": ""}, "tag"),
        ({"image": "python", "tag": "a/b"}, "tag"),
        ({"image": "python", "checksum": "md5:1"}, "checksum"),
        ({"image": "python", "checksum": f"sha256:{'A' * 64}"}, "checksum"),
    ],
)
def test_a_container_nobody_could_pull(container: dict[str, str], part: str) -> None:
    """Image, tag and checksum are held to what a registry knows."""
    assert [f"stages.0.algorithm.container.{part}"] == paths(
        stage(algorithm={"container": {"entrypoint": "sh $ALGO", **container}})
    )


@pytest.mark.parametrize("name", sorted(RESERVED_VARIABLES))
def test_variables_of_the_service_stay_its_own(name: str) -> None:
    """A consumer cannot set what the service tells the algorithm."""
    assert [f"stages.0.algorithm.envs.{name}: is set by the service"] == problems(
        stage(algorithm={"envs": {name: "1"}})
    )


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "a..b",
        "did:op:..",
        "did:op:",
        "did:op:/etc",
        "a/b",
        "/a",
        "a\\b",
        "a b",
        ".hidden",
        "-rf",
        "~root",
        "$HOME",
        "a;b",
        "a*",
        "a%2Fb",
        "ａ",
        "раypal",
        "a\u200bb",
        "a\u2215b",
        "a\u202eb",
        "e\u0301",
        "x" * 201,
        "x" * 300,
    ],
)
def test_names_that_are_no_folder_names(name: str) -> None:
    """An id becomes a folder beside others' data, so it is letters, digits and four signs, or it is refused."""
    assert ["stages.0.input.0.id"] == paths(stage(input=[data(name)]))


@pytest.mark.parametrize("name", ["a\x00b", "a\nb", "a\n", "\x7f"])
def test_names_with_control_characters(name: str) -> None:
    """Control characters are refused with the shape of the document, before anybody thinks about their meaning."""
    with pytest.raises(InvalidWorkflow) as refusal:
        parsed(stage(input=[data(name)]))
    assert ["stages.0.input.0.id"] == [problem.path for problem in refusal.value.problems]


@pytest.mark.parametrize("name", ["a", "did:op:" + "0" * 64, "did:op:a_b-c.d", "2024.csv", "x" * 200, "a:b"])
def test_names_that_are(name: str) -> None:
    """Ids as the original systems made them are folder names."""
    assert (name.removeprefix("did:op:"),) == planned(stage(input=[data(name)])).stages[0].dids


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("https://a.example/\x00", "it contains control characters"),
        ("https://a.example/a\n", "it contains control characters"),
        ("zip://a.csv::https://a.example/a.zip", "it is a chain; spell a literal :: as %3A%3A"),
        ("zip::https://a.example/a.zip", "it is a chain; spell a literal :: as %3A%3A"),
        ("https://a.example/x::file:///etc/passwd", "it is a chain; spell a literal :: as %3A%3A"),
        ("https://[1/", "its host or port is not valid"),
        ("https://a.example:port/", "its host or port is not valid"),
        ("https://a.example:99999/", "its host or port is not valid"),
        ("file:///etc/passwd", "its scheme is not one of http, https"),
        ("s3://bucket/key", "its scheme is not one of http, https"),
        ("/etc/passwd", "its scheme is not one of http, https"),
        ("https:///path", "it has no host"),
        ("https://user:password@a.example/", "it carries credentials"),
    ],
)
def test_urls_that_are_not_fetched(url: str, problem: str) -> None:
    """A URL the fetcher would refuse is refused here, for inputs and for algorithms alike, and never quoted."""
    assert [f"stages.0.input.0.url.1: {problem}"] == problems(stage(input=[data("a", "https://a.example", url)]))
    assert [f"stages.0.input.0.files.0: {problem}"] == problems(stage(input=[files("a", {"url": url})]))
    assert [f"stages.0.algorithm.url: {problem}"] == problems(stage(url=url))
    assert [f"stages.0.algorithm.file: {problem}"] == problems(stage(algorithm={"file": {"url": url}}))


@pytest.mark.parametrize(
    "url", ["https://a.example", "HTTP://a.example:8080/x?y=z#w", "https://[::1]:1/a%3A%3Ab", "https://a.example/a b"]
)
def test_urls_that_are(url: str) -> None:
    """Case, ports, queries and addresses in brackets are no reason to refuse a URL."""
    assert (UrlFile(url=url),) == planned(stage(input=[data("a", url)])).stages[0].inputs[0].files


def test_an_environment_says_which_schemes() -> None:
    """Schemes are those of the environment the stage names."""
    plan = compile_plan(parsed(stage(environment="buckets", input=[data("a", "s3://bucket/key")])), OFFERS)
    assert (UrlFile(url="s3://bucket/key"),) == plan.stages[0].inputs[0].files
    assert ["stages.0.input.0.url.0"] == paths(stage(environment="buckets", input=[data("a", "http://a.example")]))


def test_everything_at_once() -> None:
    """Problems of every stage come in one answer, in the order of their paths."""
    assert [
        "stages.0.compute.Instances",
        "stages.0.dependsOn.1",
        "stages.0.input.0.id",
        "stages.1.algorithm",
        "stages.1.algorithm.container.entrypoint",
        "stages.1.compute.namespace",
        "stages.1.input.0.stage",
        "stages.2.index",
    ] == paths(
        stage(0, after=[5, 9], input=[data("..")], compute={"Instances": 3}),
        stage(5, environment="moon", rawcode=None, entrypoint="", input=[outputs_of(6)]),
        stage(5, after=[]),
    )


def test_no_stage() -> None:
    """A workflow without stages is no workflow."""
    assert ["stages: is required"] == problems()


@pytest.mark.parametrize("part", ["algorithm", "compute", "input", "output"])
def test_a_missing_part(part: str) -> None:
    """Each part a stage must have is named when it is missing, and hides nothing that is wrong elsewhere."""
    incomplete = {key: value for key, value in stage(0).items() if key != part}
    assert [
        f"stages.0.{part}: is required",
        "stages.1.compute.Instances: only one instance of an algorithm is run",
    ] == (problems(incomplete, stage(1, compute={"Instances": 2})))


def test_no_environment_at_all() -> None:
    """A service with nothing registered says so instead of naming an empty list."""
    assert ["stages.0.compute.namespace: no such compute environment; there is none"] == problems(stage(), offers={})


def test_too_many_stages_and_inputs() -> None:
    """Size has a bound, told at once: what is checked after it takes more than linear time."""
    assert [f"stages: {MAX_STAGES + 1} stages; at most {MAX_STAGES}"] == problems(*[stage(environment="moon")] * 101)
    urls = ["https://a.example"] * MAX_URLS
    assert [f"stages: {MAX_URLS + 1} inputs, URLs and files in all; at most {MAX_URLS}"] == problems(
        stage(), stage(input=[data("a", *urls), outputs_of(0)])
    )


def test_two_environments() -> None:
    """Each stage is held to its own environment: to the schemes it allows, and to its being there."""
    bucket = [data("a", "s3://bucket/a.csv")]
    plan = compile_plan(parsed(stage(), stage(environment="buckets", input=bucket)), OFFERS)
    assert ["default", "buckets"] == [each.environment for each in plan.stages]
    assert ["stages.0.input.0.url.0"] == paths(stage(input=bucket), stage(environment="buckets"))
    assert ["stages.1.compute.namespace"] == paths(stage(), stage(environment="moon"))


def test_what_is_handed_over_between_environments() -> None:
    """
    The outputs of the stages that another one reads, also of one in the same environment, as each has a run of its own;
    in a job that is in one environment, of none.
    """

    def plan(second: str) -> Plan:
        stages = (
            stage(0),
            stage(1, environment=second, input=[outputs_of(0)]),
            stage(2, after=[1]),
            stage(3, input=[outputs_of(2)]),
        )
        return compile_plan(parsed(*stages), OFFERS)

    several = plan("buckets")
    assert ("default", "buckets") == several.environments
    assert {0: True, 1: False, 2: True, 3: False} == {each.index: each.handed_over for each in several.stages}
    assert 2 == str(several).count("hands over its outputs")
    assert {False} == {each.handed_over for each in plan("default").stages}
    assert "hands over" not in str(plan("default"))


def test_a_part_of_a_plan_waits_for_nothing_elsewhere() -> None:
    """A run that does one stage has its steps only, in their order."""
    plan = compile_plan(parsed(stage(0), stage(1, environment="buckets", input=[outputs_of(0)])), OFFERS)
    part = plan.part(1)
    assert (plan.stage(1),) == part.stages
    assert {
        "1/provision-data": (),
        "1/provision-algorithm": (),
        "1/run": ("1/provision-data", "1/provision-algorithm"),
        "1/filter": ("1/run",),
        "1/publish": ("1/filter",),
    } == {step.name: step.after for step in part.steps}
    assert ("buckets",) == part.environments


def test_an_input_has_one_source() -> None:
    """An input with two sources is refused, not silently read as one of them."""
    assert "stages.1.input.0: give one of url, files, remote, stage; url and stage is given" in problems(
        stage(), stage(input=[data("a", stage=0)])
    )
    assert "stages.0.input.0: give one of url, files, remote, stage; url and remote is given" in problems(
        stage(input=[data("a", remote={"txId": "0x1"})])
    )


# Assets that are looked up, and what is known of them.


def test_remote_assets() -> None:
    """What is to be looked up where, by whose order, and what goes to the source."""
    (only,) = planned(
        stage(
            input=[
                {"id": "did:op:a", "remote": {**REMOTE, "userdata": {"u": 1}}, "ddo": {"id": "did:op:a"}},
                {"id": "did:op:b", "remote": {"serviceId": "3"}},
            ],
            rawcode=None,
            algorithm={"id": "did:op:c", "remote": REMOTE, "algouserdata": {"v": 2}, "sha256": "AB" * 32},
            output=STORE,
        )
    ).stages
    url = STORE["metadataUri"]
    assert [
        RemoteAsset("did:op:a", "2", "0x1", {"u": 1}, url),
        RemoteAsset("did:op:b", "3", "", {}, url),
    ] == [planned.remote for planned in only.inputs]
    assert RemoteAsset("did:op:c", "2", "0x1", {"v": 2}, url) == only.algorithm_remote
    assert [{"id": "did:op:a"}, None] == [planned.ddo for planned in only.inputs]
    assert "ab" * 32 == only.algorithm_sha256


@pytest.mark.parametrize(
    "code", [{"rawcode": "x"}, {"url": "https://a.example"}, {"file": {"url": "https://a.example"}}]
)
def test_everything_wins_over_a_remote_algorithm(code: dict[str, Any]) -> None:
    """An algorithm that is there needs no looking up, and so no metadata store."""
    (only,) = planned(stage(rawcode=None, algorithm={**code, "remote": {}})).stages
    assert only.algorithm_remote is None


def test_remote_parts_of_a_printed_plan() -> None:
    """It says where they are, not what they are asked for with."""
    plan = planned(
        stage(
            input=[{"id": "did:op:a", "remote": {**REMOTE, "userdata": {"k": MARKER}}, "ddo": {"k": MARKER}}],
            rawcode=None,
            algorithm={"id": "did:op:c", "remote": REMOTE, "algouserdata": {"k": MARKER}},
            output={"metadataUri": f"https://{MARKER}.example"},
        )
    )
    assert "did:op:a: at another provider" in str(plan)
    assert "did:op:c (at another provider)" in str(plan)
    assert MARKER not in f"{plan} {plan!r} {summary_of(plan)} {plan.stages[0]!r}"


# What stages wait for.


def test_a_stage_follows_the_one_before_it() -> None:
    """With nothing said, stages run one after another by their index, wherever they stand in the document."""
    assert {1: (), 4: (1,), 9: (4,)} == depends(planned(stage(9), stage(1), stage(4)))


def test_a_stage_without_index_has_its_position() -> None:
    """An index left out is the stage's place in the document."""
    assert {0: (), 1: (0,)} == depends(planned(stage(), stage()))


def test_a_stage_follows_those_its_inputs_name() -> None:
    """Inputs from stages say what a stage waits for; then the one before it no longer counts."""
    plan = planned(stage(0), stage(1), stage(2, input=[outputs_of(0), data("a")]))
    assert {0: (), 1: (0,), 2: (0,)} == depends(plan)


def test_depends_on_decides() -> None:
    """``dependsOn`` overrules both, also when it is empty."""
    plan = planned(stage(0), stage(1, after=[]), stage(2, after=[1, 0, 1], input=[outputs_of(0)]))
    assert {0: (), 1: (), 2: (0, 1)} == depends(plan)


def test_an_input_may_come_from_further_up() -> None:
    """Outputs may be taken from any stage that is surely done by then, not only from the last one."""
    plan = planned(stage(0), stage(1), stage(2, after=[1], input=[outputs_of(0)]))
    assert (0,) == tuple(part.stage for part in plan.stage(2).inputs)
    assert ("stage-0",) == plan.stage(2).dids


def test_an_input_from_a_stage_that_may_not_be_done() -> None:
    """Outputs of a stage that is not waited for are refused: they might not be there yet."""
    assert ["stages.1.input.0.stage: stage 0 is not among the stages this one depends on"] == problems(
        stage(0), stage(1, after=[], input=[outputs_of(0)])
    )


def test_a_stage_nobody_knows() -> None:
    """References to stages that do not exist are named one by one."""
    assert ["stages.0.dependsOn.0: there is no stage 7", "stages.1.input.1.stage: there is no stage 8"] == problems(
        stage(0, after=[7]), stage(1, input=[outputs_of(0), outputs_of(8)])
    )


def test_an_index_used_twice() -> None:
    """Two stages cannot have one index, whether it was written or follows from the position."""
    assert ["stages.1.index: index 1 is used by another stage too"] == problems(stage(1), stage())


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ([stage(0, after=[0])], "stages.0.dependsOn: stages wait for each other: 0 -> 0"),
        ([stage(0, input=[outputs_of(0)])], "stages.0.dependsOn: stages wait for each other: 0 -> 0"),
        ([stage(0, after=[1]), stage(1)], "stages.0.dependsOn: stages wait for each other: 0 -> 1 -> 0"),
    ],
)
def test_stages_that_wait_for_each_other(stages: list[dict[str, Any]], problem: str) -> None:
    """A circle, even of one stage, is shown as such."""
    assert [problem] == problems(*stages)


def test_a_longer_circle() -> None:
    """Every member of a circle is shown, in the order of waiting, and nobody outside it."""
    (problem,) = problems(stage(0, after=[]), stage(1, after=[3]), stage(2, after=[1]), stage(3, after=[2, 0]))
    assert problem.split("other: ")[1] in ("1 -> 3 -> 2 -> 1", "3 -> 2 -> 1 -> 3", "2 -> 1 -> 3 -> 2")


def test_lowest_index_first() -> None:
    """Among stages that could go next the lowest index goes first, so that a document has one plan."""
    stages = [stage(0, after=[3]), stage(1, after=[]), stage(2, after=[]), stage(3, after=[])]
    assert [1, 2, 3, 0] == order(planned(*stages)) == order(planned(*reversed(stages)))


# What steps wait for.


def test_the_steps_of_a_stage() -> None:
    """Data and algorithm are fetched side by side; the rest is a chain."""
    (only,) = (planned(stage(3)),)
    assert {
        "3/provision-data": (),
        "3/provision-algorithm": (),
        "3/run": ("3/provision-data", "3/provision-algorithm"),
        "3/filter": ("3/run",),
        "3/publish": ("3/filter",),
    } == {step.name: step.after for step in only.steps}
    assert [3] * 5 == [step.stage for step in only.steps]
    assert list(Phase) == [step.phase for step in only.steps]


def test_stages_meet_where_they_depend_on_each_other() -> None:
    """Independent stages share no wait; one that depends on both begins once both have published."""
    after = {step.name: step.after for step in planned(stage(0), stage(1, after=[]), stage(2, after=[0, 1])).steps}
    assert () == after["0/provision-data"] == after["1/provision-data"]
    assert () == after["0/provision-algorithm"] == after["1/provision-algorithm"]
    assert ("0/publish", "1/publish") == after["2/provision-data"] == after["2/provision-algorithm"]


# What a stage is given.


def test_inputs_in_the_order_of_their_index() -> None:
    """Inputs are numbered by their index; those without one keep their place."""
    plan = planned(stage(input=[data("c", index=2), data("a", index=0), data("b")]))
    assert ("a", "c", "b") == plan.stages[0].dids


def test_url_wins_over_raw_code() -> None:
    """As in the document's own example: with both given, the code is fetched."""
    (both,) = planned(stage(url="https://a.example/algo", rawcode="x")).stages
    assert (UrlFile(url="https://a.example/algo"), None) == (both.algorithm_file, both.rawcode)
    (raw,) = planned(stage(url="", rawcode="x")).stages
    assert (None, "x") == (raw.algorithm_file, raw.rawcode)


@pytest.mark.parametrize(("asked", "given"), [(30, 30.0), (1000, 100.0), (None, 100.0), (0.5, 0.5)])
def test_time_is_the_smaller_of_two(asked: float | None, given: float) -> None:
    """A job has what it asks for and never more than its environment gives."""
    plan = compile_plan(parsed(stage(compute={"maxtime": asked})), OFFERS)
    assert given == plan.stages[0].limits.seconds


def test_resources_are_the_smaller_of_two() -> None:
    """The same for memory, disk, processors; a GPU is there only for who asks."""
    little = stage(compute={"resources": {"cpu": 0.5, "ram": 1, "disk": 2, "gpu": 1}})
    much = stage(compute={"resources": {"cpu": 64, "ram": 512, "disk": 4096}})
    limits = [compile_plan(parsed(one), OFFERS).stages[0].limits for one in (little, much)]
    assert [(0.5, 1 * GIB, 2 * GIB, 1), (2, 4 * GIB, 8 * GIB, 0)] == [
        (each.cpus, each.memory_bytes, each.disk_bytes, each.gpus) for each in limits
    ]


def test_hardly_anything_is_not_nothing() -> None:
    """Next to no memory is a limit of a byte: a limit of 0 would be read as none."""
    limits = planned(stage(compute={"resources": {"ram": 1e-12, "disk": 1e-12}})).stages[0].limits
    assert (1, 1) == (limits.memory_bytes, limits.disk_bytes)


def test_what_an_algorithm_is_told() -> None:
    """Custom data, variables and publish flags reach the plan as they were written."""
    (only,) = planned(
        stage(
            algorithm={"algocustomdata": {"a": [1]}, "envs": {"A": 1}, "id": "did:op:02"},
            output={"publishoutput": False},
        )
    ).stages
    assert ({"a": [1]}, {"A": "1"}, "did:op:02") == (only.custom_data, dict(only.variables), only.algorithm_id)
    assert (False, True) == (only.publish_output, only.publish_algorithm_log)


GOLDEN: Final = """\
agreement 111, owner 0x3aA8c0B3dE1f57d294f6B1c5a7E9024D86Fb51c2: 2 stage(s)

stage 0 in default
  input      did:op:01: 2 URL(s)
  algorithm  fit (by URL) for python
  limits     60 s, 2 GiB memory, 10 GiB disk, 1 cpu, 0 gpu
  publishes  outputs and log

stage 1 in default, after stage 0
  input      stage-0: stage 0
  algorithm  unnamed (raw code) for python
  limits     60 s, 0.5 GiB memory, 10 GiB disk, 1 cpu, 0 gpu
  publishes  nothing

0/provision-data       <-  start
0/provision-algorithm  <-  start
0/run                  <-  0/provision-data, 0/provision-algorithm
0/filter               <-  0/run
0/publish              <-  0/filter
1/provision-data       <-  0/publish
1/provision-algorithm  <-  0/publish
1/run                  <-  1/provision-data, 1/provision-algorithm
1/filter               <-  1/run
1/publish              <-  1/filter"""


def test_a_plan_can_be_read() -> None:
    """What a plan prints is what will be done."""
    plan = planned(
        stage(
            input=[data("did:op:01", "https://a.example/1", "https://a.example/2")],
            url="https://a.example/fit.py",
            algorithm={"id": "fit"},
        ),
        stage(
            input=[outputs_of(0)],
            entrypoint="sh $ALGO",
            compute={"resources": {"ram": 0.5}},
            output={"publishoutput": 0, "publishalgolog": 0},
        ),
    )
    assert GOLDEN == str(plan)


def test_no_secret_in_what_is_shown_of_a_plan() -> None:
    """URLs, code, user data and variables show neither in a plan, nor in its summary, nor in a refusal."""
    secrets = {
        "algouserdata": {"k": MARKER},
        "algocustomdata": [MARKER],
        "envs": {"TOKEN": MARKER},
    }
    host = f"{MARKER}.example"
    for one in (
        stage(url=f"https://{host}", algorithm=secrets, input=[data("a", f"https://{host}")]),
        stage(rawcode=MARKER, algorithm=secrets),
        stage(
            algorithm={**secrets, "file": {"url": f"https://{host}", "headers": {"X-Key": MARKER}}},
            input=[files("a", {**GRAPHQL, "url": f"https://{host}", "query": MARKER, "variables": {"a": MARKER}})],
        ),
    ):
        document = parsed(one)
        plan = compile_plan(document, OFFERS)
        assert MARKER not in repr(document)
        assert MARKER not in f"{plan} {plan!r} {summary_of(plan)} {plan.stages[0]!r}"
    broken = stage(
        url=f"gopher://{host}",
        algorithm={**secrets, "envs": {f"{MARKER}-": MARKER, "HOME": MARKER}, "id": f"../{MARKER}"},
        compute={"network": False},
        input=[
            files("b", {"url": f"zip::{MARKER}"}, {"url": f"https://{host}", "headers": {"Host": MARKER}}),
            data("a", f"zip::{MARKER}", f"https://{MARKER}@host", f"https://{MARKER}:x"),
            data(f"/{MARKER}"),
        ],
    )
    assert not [line for line in problems(broken) if MARKER in line]


# File objects.


def test_file_objects_of_an_input_and_an_algorithm() -> None:
    """Files of any kind, in their order; one without a type is a URL; an algorithm's file wins over URL and code."""
    transaction = "a" * 43
    (only,) = planned(
        stage(
            url="https://a.example/other",
            input=[
                files(
                    "a",
                    {"url": "https://a.example", "method": "POST"},
                    {"type": "arweave", "transactionId": transaction},
                )
            ],
            algorithm={"file": GRAPHQL, "id": "fit"},
        )
    ).stages
    assert UrlFile(url="https://a.example", method="POST") == only.inputs[0].files[0]
    assert ArweaveFile(type="arweave", transaction_id=transaction) == only.inputs[0].files[1]
    assert ("graphql", None) == (only.algorithm_file and only.algorithm_file.type, only.rawcode)


def test_files_of_a_plan_are_counted_by_kind() -> None:
    """A plan says how many files of which kind, and that an algorithm has no network where it was taken away."""
    plan = planned(
        stage(
            input=[files("a", GRAPHQL, {"url": "https://a.example"}, GRAPHQL)],
            algorithm={"file": GRAPHQL},
            compute={"network": False},
        )
    )
    shown = str(plan)
    assert "a: 2 graphql file(s), 1 URL(s)" in shown
    assert "unnamed (by graphql file) for python" in shown
    assert "  network    none" in shown
    assert 3 == summary_of(plan)["urls"]


@pytest.mark.parametrize(("asked", "given"), [(None, True), (True, True), (False, False)])
def test_a_network_can_only_be_taken_away(asked: bool | None, given: bool) -> None:
    """What a document says of the network lowers what the environment gives, and never raises it."""
    assert given == planned(stage(compute={"network": asked})).stages[0].network


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ({"url": "https://a.example", "headers": {"Host": "b"}}, "it sets a header that is not its owner's to set"),
        ({"url": "https://a.example", "headers": {"Sec-X": "b"}}, "it sets a header that is not its owner's to set"),
        ({**GRAPHQL, "headers": {"content-length": "1"}}, "it sets a header that is not its owner's to set"),
        ({**GRAPHQL, "url": "https://u:p@a.example"}, "it carries credentials"),
    ],
)
def test_files_that_are_not_fetched(file: dict[str, Any], problem: str) -> None:
    """What is sent along with a request is looked at too."""
    assert [f"stages.0.input.0.files.0: {problem}"] == problems(stage(input=[files("a", file)]))


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ({"url": "s3://a/b", "method": "POST"}, "it has a method or headers, which only http and https know"),
        ({**GRAPHQL, "url": "s3://a/b"}, "its scheme is not http or https"),
    ],
)
def test_files_of_buckets_are_just_that(file: dict[str, Any], problem: str) -> None:
    """Methods, headers and queries are for http, in an environment that allows other schemes too."""
    found = problems(stage(environment="buckets", input=[files("a", file)]))
    assert [f"stages.0.input.0.files.0: {problem}"] == found


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ({"type": MARKER}, "type: must be one of"),
        ({}, "url: Field required"),
        ({"url": ""}, "url: "),
        ({"url": "https://a.example", "method": MARKER}, "method: "),
        ({"url": "https://a.example", "headers": {f"{MARKER} {MARKER}": "b"}}, "headers: "),
        ({"url": "https://a.example", "headers": {"A": f"{MARKER}\n"}}, "headers: "),
        ({"type": "ipfs", "hash": f"../{MARKER}"}, "hash: "),
        ({**GRAPHQL, "variables": {"a": float("nan")}}, "has a number that JSON does not have"),
        (MARKER, ""),
    ],
)
def test_what_is_no_file(file: Any, problem: str) -> None:
    """The shape of a file is refused with the place where it stands, quoting nothing of it."""
    with pytest.raises(InvalidWorkflow) as refusal:
        parsed(stage(input=[{"id": "a", "files": [file]}]))
    (found,) = map(str, refusal.value.problems)
    assert found.startswith(f"stages.0.input.0.files.0: {problem}")
    assert MARKER not in found


# Whatever a document says.


@st.composite
def graphs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Stages whose dependencies are any acyclic graph, in any order in the document."""
    count = draw(st.integers(1, 7))
    edges = [edge for edge in combinations(range(count), 2) if draw(st.booleans())]
    names = draw(st.permutations(range(count)))
    stages = [stage(names[n], after=[names[a] for a, b in edges if b == n]) for n in range(count)]
    return draw(st.permutations(stages))


@given(graphs())
def test_every_step_comes_after_what_it_waits_for(stages: list[dict[str, Any]]) -> None:
    """Whatever the dependencies are, a plan can be done from top to bottom."""
    plan = planned(*stages)
    done: set[str] = set()
    for step in plan.steps:
        assert done.issuperset(step.after)
        done.add(step.name)
    assert len(stages) * len(Phase) == len(done)
    for each in stages:
        assert tuple(sorted(each["dependsOn"])) == plan.stage(each["index"]).depends_on


ANYTHING: Final = st.recursive(
    st.sampled_from([None, True, 0, 1, -1, 1.5, float("nan"), float("inf"), 10**400, "", "a", "\ud800", "\x00", "::"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "url", "\ud800"]), inner),
    max_leaves=4,
)
KEYS: Final = (
    *("agreementId", "owner", "stages", "index", "input", "compute", "algorithm", "output", "dependsOn"),
    *("id", "url", "files", "file", "type", "headers", "remote", "stage", "txId", "serviceId", "userdata", "ddo"),
    *("Instances", "namespace", "maxtime", "resources", "cpu", "ram", "disk", "gpu"),
    *("rawcode", "container", "image", "tag", "checksum", "entrypoint", "algouserdata", "algocustomdata", "envs"),
    *("publishoutput", "whitelist", "metadata", "metadataUri", "sha256"),
)


@st.composite
def spoiled(draw: st.DrawFn) -> Any:
    """A good document of two stages, a few of whose values were put something else in place of."""
    document: dict[str, Any] = workflow(
        stages=[
            stage(0, input=[data("a"), files("b", GRAPHQL)], algorithm={"envs": {"A": "1"}, "algocustomdata": {}}),
            stage(
                1,
                input=[outputs_of(0), {"id": "did:op:c", "remote": REMOTE, "ddo": {"id": "did:op:c"}}],
                compute={"network": False, "resources": {"ram": 1}},
                output={"whitelist": ["0x1"], **STORE},
            ),
        ]
    )
    # Of its own: parts of it are constants, and what was spoiled once would be spoiled in the next document.
    document = deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        part: Any = document
        while isinstance(part, dict | list) and part:
            named = isinstance(part, dict)
            key: Any = draw(st.sampled_from(sorted(part) if named else range(len(part))))
            inner: Any = part[key]
            if not isinstance(inner, dict | list) or draw(st.integers(0, 4)) == 0:
                place: Any = draw(st.sampled_from(KEYS)) if named and draw(st.booleans()) else key
                part[place] = draw(ANYTHING)
                break
            part = inner
    return document


@given(spoiled())
def test_a_document_is_taken_or_refused(document: Any) -> None:
    """Whatever a document holds, the answer is a plan that can be printed, sealed and summed up, or a refusal."""
    try:
        read = parse_workflow(document)
        plan = compile_plan(read, OFFERS)
    except InvalidWorkflow as refusal:
        assert refusal.problems
        return
    assert str(plan)
    assert document_digest(read)
    assert str(summary_of(plan))
    assert plan == compile_plan(parse_workflow(read.model_dump(mode="json")), OFFERS)
