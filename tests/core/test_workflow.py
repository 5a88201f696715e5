"""The document: every spelling in, one value out, and nothing secret in what is shown of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.errors import InvalidWorkflow, Problem
from flows.jobs import document_digest
from flows.workflow import Output, Workflow, parse_workflow
from tests.documents import data, parsed, stage, workflow

SPEC: Final = Path(__file__).parent.parent / "spec" / "000-init-request.json"
MARKER: Final = "hush-5f2c77ab"

FREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def printed() -> Workflow:
    return parse_workflow(json.loads(SPEC.read_text())["workflow"])


def again(document: Workflow) -> Workflow:
    """What a worker has: the value after it was dumped, sealed as JSON text and opened."""
    return parse_workflow(json.loads(json.dumps(document.model_dump(mode="json"))))


def faults(document: Any) -> tuple[Problem, ...]:
    with pytest.raises(InvalidWorkflow) as refusal:
        parse_workflow(document)
    return refusal.value.problems


def paths(document: Any) -> list[str]:
    return [problem.path for problem in faults(document)]


def output(**keys: Any) -> Output:
    return parsed(stage(output=keys)).stages[0].output


def test_the_document_of_the_spec_is_taken_as_printed() -> None:
    """Every value printed in spec 000 is found again where it belongs."""
    document = printed()
    (only,) = document.stages
    assert ("111", "0x22") == (document.agreement_id, document.owner)
    assert [2, 1] == [len(part.url) for part in only.input]
    assert [0, 1] == [part.index for part in only.input]
    assert (1, "withgpu", 3600) == (only.compute.instances, only.compute.namespace, only.compute.maxtime)
    assert "https://raw.githubusercontent.com/oceanprotocol/test-algorithm/master/javascript/algo.js" == (
        only.algorithm.url
    )
    assert "console.log('this is a test')" == only.algorithm.rawcode
    container = only.algorithm.container
    assert ("node", "10", "node $ALGO") == (container.image, container.tag, container.entrypoint)
    assert "https://nile.dev-ocean.com" == only.output.node_uri
    assert "https://brizo.marketplace.dev-ocean.com" == only.output.brizo_uri
    assert "0x4aaab179035dc57b35e2ce066919048686f82972" == only.output.brizo_address
    assert "https://aquarius.marketplace.dev-ocean.com" == only.output.metadata_uri
    assert "https://secret-store.nile.dev-ocean.com" == only.output.secret_store_uri
    assert 2 == len(only.output.whitelist)
    assert "0x200" == only.output.owner
    assert only.output.publish_output and only.output.publish_algorithm_log


@pytest.mark.parametrize(
    ("field", "spellings", "value"),
    [
        ("brizo_uri", ("brizoUrl", "brizoUri"), "https://brizo.example"),
        ("metadata_uri", ("metadataUrl", "metadataUri"), "https://metadata.example"),
        ("secret_store_uri", ("secretStoreUrl", "secretStoreUri"), "https://store.example"),
        ("node_uri", ("nodeUri", "nodeUrl"), "https://node.example"),
        ("brizo_address", ("brizoAddress",), "0x01"),
        ("publish_output", ("publishoutput", "publishOutput"), False),
        ("publish_algorithm_log", ("publishalgolog", "publishAlgorithmLog"), False),
    ],
)
def test_every_spelling_of_an_output_key(field: str, spellings: tuple[str, ...], value: object) -> None:
    """Both spellings of a key of the output mean the same."""
    assert [value] * len(spellings) == [getattr(output(**{spelling: value}), field) for spelling in spellings]


@pytest.mark.parametrize(
    ("written", "meant"),
    [(True, True), (1, True), ("1", True), ("true", True), (False, False), (0, False), ("0", False), (None, True)],
)
def test_publish_flags(written: object, meant: bool) -> None:
    """A flag is true as true, 1 or "1", false as its opposites, and true where nothing is said."""
    assert meant is output(publishoutput=written).publish_output
    assert output().publish_output


@pytest.mark.parametrize("written", [2, "maybe", [], {}, 0.5])
def test_a_flag_that_is_none(written: object) -> None:
    """What is neither true nor false is refused, not guessed."""
    assert ["stages.0.output.publishoutput"] == paths(workflow(stages=[stage(output={"publishoutput": written})]))


def test_one_url_or_a_list() -> None:
    """A URL by itself is a list of one."""
    one = parsed(stage(input=[{"id": "a", "url": "https://a.example/1"}]))
    many = parsed(stage(input=[{"id": "a", "url": ["https://a.example/1"]}]))
    assert one == many


@pytest.mark.parametrize(("tag", "text"), [(10, "10"), ("10", "10"), (3.12, "3.12")])
def test_a_tag_may_be_a_number(tag: object, text: str) -> None:
    """Tags arrive as numbers where clients write them without quotes."""
    container = {"image": "node", "tag": tag, "entrypoint": "node $ALGO"}
    assert text == parsed(stage(algorithm={"container": container})).stages[0].algorithm.container.tag


def test_unknown_keys_are_ignored() -> None:
    """A key nobody knows changes nothing, at any level."""
    plain, more = workflow(), workflow(stages=[stage(algorithm={"colour": 1}, compute={"colour": 1}) | {"colour": 1}])
    assert parse_workflow(plain) == parse_workflow({**more, "colour": {"a": []}})


def test_the_sealed_form_is_the_same_document() -> None:
    """What a worker opens is what was handed in, for the document of the spec and for one with everything in it."""
    full = parsed(
        stage(
            0,
            input=[data("did:op:a", "https://a.example/1", "https://a.example/2", index=1), data("b", index=0)],
            after=[],
            url="https://a.example/algo",
            algorithm={"algouserdata": {"a": [1, None]}, "algocustomdata": [1.5, "x"], "envs": {"A": "1", "B": 2}},
            compute={"resources": {"cpu": 1, "ram": 0.5, "disk": 2, "gpu": 1}},
            output={"publishoutput": 0, "metadata": {"n": {"m": []}}, "whitelist": ["0x1"], "brizoUrl": "https://b"},
        ),
        stage(
            7,
            input=[
                {"stage": 0},
                {
                    "id": "r",
                    "remote": {"txId": "0x1", "serviceId": "2", "userdata": {"u": 1}},
                    "ddo": {"id": "r", "stats": {"orders": 1}},
                },
            ],
            algorithm={"sha256": "ab" * 32},
        ),
    )
    for document in (printed(), full):
        assert document == again(document)
        assert document_digest(document) == document_digest(again(document))


def test_a_newer_document_of_an_asset_is_no_other_job() -> None:
    """Metadata stores count orders in it, so of one sent twice the second would be refused as another."""
    first, second = (
        parsed(stage(input=[data("a", ddo={"id": "a", "stats": {"orders": orders}})])) for orders in (1, 2)
    )
    assert first != second
    assert document_digest(first) == document_digest(second)


@given(custom=FREE, user=FREE, code=st.text(), variables=st.dictionaries(st.text(), st.text(), max_size=3))
def test_free_values_survive_sealing(custom: Any, user: Any, code: str, variables: dict[str, str]) -> None:
    """Whatever JSON a consumer hands over as data, code or variables comes out as it went in."""
    algorithm = {"algocustomdata": custom, "algouserdata": user, "envs": variables}
    document = parsed(stage(rawcode=code, algorithm=algorithm))
    assert document == again(document)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rawcode", "print('\ud800')"),
        ("algocustomdata", {"deep": "\udfff"}),
        ("algocustomdata", {"\ud800": 1}),
        ("algocustomdata", float("nan")),
        ("algocustomdata", [float("inf")]),
        ("algouserdata", float("nan")),
        ("sha256", "ab" * 31),
        ("sha256", "sha256:" + "ab" * 32),
    ],
)
def test_what_cannot_be_written_down_again_is_refused(key: str, value: object) -> None:
    """Half characters and numbers JSON does not have pass a lenient parser; they must not reach a worker."""
    assert [f"stages.0.algorithm.{key}"] == paths(workflow(stages=[stage(algorithm={key: value})]))


@pytest.mark.parametrize("ddo", [[], "x", {"a": "\ud800"}, {"a": float("nan")}, {"a": "x" * 1_000_001}])
def test_documents_of_assets_are_objects_with_a_bound(ddo: object) -> None:
    """They pass through the same hands as everything free."""
    assert ["stages.0.input.0.ddo"] == paths(workflow(stages=[stage(input=[data("a", ddo=ddo)])]))


def test_nesting_has_a_bound() -> None:
    """Values nested deeper than can be serialized again are refused with a path."""
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    assert ["stages.0.algorithm.algocustomdata"] == paths(workflow(stages=[stage(algorithm={"algocustomdata": deep})]))


def test_every_fault_at_once_with_its_path() -> None:
    """A document with many faults of shape is answered with all of them."""
    broken = workflow(
        agreement="",
        stages=[
            {key: value for key, value in stage().items() if key != "algorithm"},
            stage(compute={"maxtime": -1}, algorithm={"envs": {"A": {"b": 1}}}),
            stage(input=[{"id": "a\x00b", "url": ["", 7]}]),
        ],
    )
    del broken["owner"]
    assert [
        "agreementId",
        "owner",
        "stages.0.algorithm",
        "stages.1.algorithm.envs.A",
        "stages.1.compute.maxtime",
        "stages.2.input.0.id",
        "stages.2.input.0.url.0",
        "stages.2.input.0.url.1",
    ] == paths(broken)


@pytest.mark.parametrize("document", [None, [], "workflow", 7, {"stages": None}])
def test_no_document_at_all(document: object) -> None:
    """What is no document is refused like any other, not by a traceback."""
    assert faults(document)


def with_marker() -> dict[str, Any]:
    return stage(
        input=[
            data("a", f"https://a.example/{MARKER}"),
            {"id": "b", "remote": {"userdata": {"k": MARKER}}, "ddo": {"k": MARKER}},
        ],
        url=f"https://a.example/{MARKER}",
        rawcode=MARKER,
        algorithm={
            "algouserdata": {"k": MARKER},
            "algocustomdata": [MARKER],
            "envs": {"TOKEN": MARKER},
        },
    )


def test_no_secret_in_what_is_shown_of_a_document() -> None:
    """URLs, code, user data and variables do not show in the text of a document."""
    document = parsed(with_marker())
    assert MARKER not in repr(document) + str(document)


@pytest.mark.parametrize(
    "broken",
    [
        {"url": [MARKER]},
        {"rawcode": {"k": MARKER}},
        {"envs": {MARKER: {"k": MARKER}}},
        {"envs": {"TOKEN": [MARKER]}},
        {"envs": {f"{MARKER}\ud800": "x"}},
        {"rawcode": f"{MARKER}\ud800"},
        {"algocustomdata": {MARKER: "\ud800"}},
        {"remote": MARKER},
        {"sha256": MARKER},
        {"container": MARKER},
        {"container": {"entrypoint": [MARKER]}},
    ],
)
def test_no_secret_in_a_refusal(broken: dict[str, Any]) -> None:
    """A refusal says where and what, and quotes nothing of the document."""
    with pytest.raises(InvalidWorkflow) as refusal:
        parsed(stage(algorithm=broken))
    assert MARKER not in str(refusal.value) + repr(refusal.value) + repr(refusal.value.problems)
