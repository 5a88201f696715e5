"""Assets: DDOs as values, and what is no DDO."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from blocks.assets import (
    Agreement,
    Asset,
    AssetMalformed,
    AssetWithheld,
    ConsumerParameter,
    LocalAsset,
    TrustedAlgorithm,
    parse_asset,
    usable_asset,
)

DDOS: Final = Path(__file__).parent / "ddos"
PUBLISHER: Final = "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266"
MARKER: Final = "hush-8fa14cdd754f"


def ddo(name: str = "dataset") -> dict[str, Any]:
    document: dict[str, Any] = json.loads((DDOS / f"{name}.json").read_text("utf-8"))
    return document


def test_a_data_set() -> None:
    """Everything the service decides by is read, addresses in lower case, services in their order."""
    asset = parse_asset(ddo())
    access, compute = asset.services
    assert (8996, "0x5fbdb2315678afecb367f032d93f642f64180aa3") == (asset.chain_id, asset.nft_address)
    assert ("dataset", PUBLISHER, None) == (asset.metadata.type, asset.publisher, asset.withheld)
    assert [("access", 0, 86_400), ("compute", 1, 3600)] == [(s.type, s.index, s.timeout) for s in asset.services]
    assert asset.service(compute.id) is compute and asset.service("other") is None
    assert "0x9fe46736679d2d9a65f0992f2272de9f3c7fa6e0" == compute.datatoken
    assert (ConsumerParameter(name="river", required=True),) == compute.parameters and () == access.parameters
    assert (False, True, (PUBLISHER,)) == (
        compute.compute.allow_raw_algorithm,
        compute.compute.allow_network_access,
        compute.compute.trusted_publishers,
    )
    (trusted,) = compute.compute.trusted_algorithms
    assert isinstance(trusted, TrustedAlgorithm) and (trusted.files_checksum or "").startswith("b4908c86")
    assert (("0xc41808bbef371ad5cfc76466ddf9dee228d2bdaa",),) == tuple(c.values for c in asset.credentials.allow)


def test_an_algorithm() -> None:
    """Null stands for nothing; an asset that is only unlisted may be used."""
    asset = usable_asset(ddo("algorithm"))
    algorithm = asset.metadata.algorithm
    assert algorithm is not None and ("python3 $ALGO", "python") == (
        algorithm.container.entrypoint,
        algorithm.container.image,
    )
    assert () == algorithm.parameters
    assert () == asset.credentials.allow


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda d: d.pop("id"), "id"),
        (lambda d: d.pop("metadata"), "metadata"),
        (lambda d: d.pop("services"), "services"),
        (lambda d: d.update(services={}), "services"),
        (lambda d: d.update(services=[MARKER]), "services.0"),
        (lambda d: d["services"][1].update(timeout=-1), "services.1.timeout"),
        (lambda d: d["services"][1].update(compute={"allowRawAlgorithm": MARKER}), "allowRawAlgorithm"),
        (lambda d: d["metadata"].update(type=MARKER), "metadata.type"),
        (lambda d: d.update(nft={"state": MARKER}), "nft.state"),
        (lambda d: d.update(purgatory={"state": MARKER}), "purgatory.state"),
    ],
)
def test_what_is_no_ddo(change: Callable[[dict[str, Any]], Any], names: str) -> None:
    """The fault names the field and quotes nothing."""
    document = ddo()
    change(document)
    with pytest.raises(AssetMalformed) as fault:
        usable_asset(document)
    assert names in str(fault.value) and MARKER not in str(fault.value)


@pytest.mark.parametrize("document", [None, 1, [], [ddo()], {}])
def test_other_json(document: Any) -> None:
    with pytest.raises(AssetMalformed):
        usable_asset(document)


@pytest.mark.parametrize("state", [1, 2, 3, 4, 6])
def test_withdrawn(state: int) -> None:
    """By the NFT's state; also where a store has kept nothing but that of the document."""
    document = ddo()
    document["nft"]["state"] = state
    with pytest.raises(AssetWithheld, match=str(state)):
        usable_asset(document)
    with pytest.raises(AssetWithheld, match=str(state)):
        usable_asset({name: document[name] for name in ("id", "chainId", "nftAddress", "nft")})
    assert parse_asset(document).withheld


def test_in_purgatory() -> None:
    document = ddo()
    document["purgatory"] = {"state": True, "reason": MARKER}
    with pytest.raises(AssetWithheld, match="purgatory") as fault:
        usable_asset(document)
    assert MARKER not in str(fault.value)


def test_encrypted_as_a_whole() -> None:
    with pytest.raises(AssetWithheld, match="encrypted"):
        usable_asset("0x04fe0c61")


def test_no_document_says_it_is_local() -> None:
    """Whether files may stand in clear is a type, which nothing in a document sets; written down, it is lost."""
    local = parse_asset(ddo(), LocalAsset)
    assert isinstance(local, LocalAsset)
    spoofed = {**ddo(), "local": True, "trusted": True, "kind": "LocalAsset"}
    for asset in (parse_asset(spoofed), Asset.model_validate_json(local.model_dump_json())):
        assert Asset is type(asset)


def test_files_are_in_no_repr() -> None:
    document = ddo()
    document["services"][0]["files"] = [{"url": MARKER}]
    assert MARKER not in repr(parse_asset(document, LocalAsset))


def test_agreements_are_strict() -> None:
    """Ids and addresses compare in lower case; a field that is misspelt is not ignored, for it may narrow."""
    grant = {"id": "0xAB", "did": "did:op:01", "consumer": PUBLISHER.upper().replace("X", "x")}
    agreement = Agreement.model_validate(grant)
    assert ("0xab", PUBLISHER, None, None) == (
        agreement.id,
        agreement.consumer,
        agreement.service_id,
        agreement.algorithm,
    )
    for wrong in ({"consumr": PUBLISHER}, {"consumer": "0x12"}, {"algorithm": "did:x"}, {"did": None}):
        with pytest.raises(ValueError):
            Agreement.model_validate({**grant, **wrong})
