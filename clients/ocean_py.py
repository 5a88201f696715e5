"""
ocean.py as it is, against a running service: ``python ocean_py.py encrypt|jobs <file>``, in the environment made from
requirements.txt.

The file holds what it works on, as JSON; tests/test_clients.py writes it. Every step prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import enforce_typing

# It checks the types of arguments, and breaks every function that takes Any on Python 3.11, where that is a class.
# Nothing of ocean.py itself is changed.
enforce_typing.enforce_types = lambda wrapped: wrapped

# ruff: noqa: E402
from eth_account import Account
from ocean_lib.data_provider.data_encryptor import DataEncryptor
from ocean_lib.data_provider.data_service_provider import DataServiceProvider
from ocean_lib.data_provider.fileinfo_provider import FileInfoProvider
from ocean_lib.example_config import get_config_dict
from ocean_lib.models.compute_input import ComputeInput
from ocean_lib.models.datatoken_base import DatatokenBase
from ocean_lib.ocean.ocean import Ocean

_OUT = sys.stdout


def told(step: str, **facts: Any) -> None:
    print(json.dumps({"step": step, **facts}), file=_OUT, flush=True)


def encrypt(given: Mapping[str, Any]) -> None:
    for name, asset in given["encrypt"].items():
        files = DataEncryptor.encrypt(asset, given["provider"], given["chainId"]).text
        told("encrypt", name=name, files=files)


def jobs(given: Mapping[str, Any]) -> None:
    url, chain_id = given["provider"], given["chainId"]
    wallet = Account.from_key(given["key"])
    config = get_config_dict(given["rpc"])
    ocean = Ocean({**config, "METADATA_CACHE_URI": given["metadata"], "PROVIDER_URL": url})

    provider = DataServiceProvider
    told(
        "discovery",
        valid=provider.is_valid_provider(url),
        address=provider.get_provider_address(url, chain_id),
        serviceEndpoints=provider.get_service_endpoints(url),
    )
    environments = ocean.compute.get_c2d_environments(url, chain_id)
    told("environments", environments=environments, free=ocean.compute.get_free_c2d_environment(url, chain_id))
    environment = next(each for each in environments if each["priceMin"])

    dataset = ocean.assets.resolve(given["dataset"]["did"])
    compute = dataset.get_service_by_id(given["dataset"]["serviceId"])
    algorithm = ocean.assets.resolve(given["algorithm"]["did"])
    access = algorithm.get_service_by_id(given["algorithm"]["serviceId"])
    told(
        "fileinfo",
        asset=FileInfoProvider.fileinfo(dataset.did, compute, with_checksum=True).json(),
        file=provider.check_single_file_info({"type": "url", "url": given["file"], "method": "GET"}, url),
    )
    told("initialize", **provider.initialize(algorithm.did, access, wallet.address).json())

    def start(seconds: int, orders: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        inputs = (
            ComputeInput(dataset, compute, orders.get("dataset")),
            ComputeInput(algorithm, access, orders.get("algorithm")),
        )
        # Fees have to be allowed by the consumer; what they will be is told by the same call that ordering makes.
        until = int(time.time()) + 300
        named = [each.as_dictionary() for each in inputs]
        asked = provider.initialize_compute(
            named[:1], named[1], url, environment["consumerAddress"], environment["id"], until
        ).json()
        told("initializeCompute", **asked)
        for cost in (*asked["datasets"], asked["algorithm"]):
            fee = cost.get("providerFee")
            if fee and int(fee["providerFeeAmount"]):
                token = DatatokenBase.get_typed(config, fee["providerFeeToken"])
                # Priced to the second: a little more than now.
                token.approve(cost["datatoken"], 2 * int(fee["providerFeeAmount"]), {"from": wallet})
        ordered, code = ocean.assets.pay_for_compute_service(
            datasets=[inputs[0]],
            algorithm_data=inputs[1],
            compute_environment=environment["id"],
            valid_until=until,
            consume_market_order_fee_address=wallet.address,
            tx_dict={"from": wallet},
            consumer_address=environment["consumerAddress"],
        )
        paid = {"dataset": ordered[0].transfer_tx_id, "algorithm": code.transfer_tx_id}
        told("order", **paid)
        job_id = ocean.compute.start(
            consumer_wallet=wallet,
            dataset=ordered[0],
            compute_environment=environment["id"],
            algorithm=code,
            algorithm_algocustomdata={"seconds": seconds},
        )
        told("start", jobId=job_id)
        return job_id, paid

    def until(job_id: str, reached: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
        while True:
            job = ocean.compute.status(dataset, compute, job_id, wallet)
            if reached(job) or job["dateFinished"]:
                return dict(job)
            time.sleep(0.2)

    first, orders = start(0, {})
    done = until(first, lambda job: False)
    told("status", job=done)
    for index, result in enumerate(done["results"]):
        body = ocean.compute.result(dataset, compute, first, index, wallet)
        told("result", name=result["filename"], type=result["type"], text=body.decode())
    told(
        "outputs",
        texts=[each.decode() for each in ocean.compute.compute_job_result_logs(dataset, compute, first, wallet)],
    )

    second, _ = start(100, orders)
    told("running", job=until(second, lambda job: job["status"] == 40))
    told("stop", job=ocean.compute.stop(dataset, compute, second, wallet))
    told("stopped", job=until(second, lambda job: False))
    told("delete", job=provider.delete_compute_job(dataset.did, second, compute, wallet))


if __name__ == "__main__":
    # The library prints what it signs; standard output is for the steps.
    with redirect_stdout(sys.stderr):
        {"encrypt": encrypt, "jobs": jobs}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
