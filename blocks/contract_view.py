"""What a view function of a contract returns, as JSON. A module of its own: web3 takes more than a second to import."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, cast

from web3 import AsyncWeb3
from web3.contract.async_contract import AsyncContractFunction
from web3.exceptions import BadFunctionCallOutput, ContractLogicError, Web3RPCError
from web3.providers.async_base import AsyncJSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from blocks.files import SmartContractFile

LARGEST_SAFE: Final = 2**53 - 1
"""Beyond it, not every reader of JSON keeps a number exact."""

Post = Callable[[bytes], Awaitable[bytes]]
"""Sends a JSON-RPC request to the node of the chain and returns its answer."""


class NoAnswer(Exception):
    """The function has no value to tell. The text quotes neither the file nor the node."""


class _Node(AsyncJSONBaseProvider):
    """
    A node reached by *post*. web3's own provider writes its URL, which carries a key, into the log, tries again by
    rules of its own, and reads answers of any length.
    """

    # EIP-3668: a contract could have this machine fetch any URL, behind the guard's back.
    global_ccip_read_enabled = False

    def __init__(self, post: Post) -> None:
        super().__init__()
        self._post = post

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        return self.decode_rpc_response(await self._post(self.encode_rpc_request(method, params)))


async def call_view(file: SmartContractFile, post: Post) -> bytes:
    """
    The function's value at the latest block: one output as it is, several as a list, structures as lists, bytes as
    ``0x…``, integers beyond 2**53 - 1 as strings.

    Raises:
        NoAnswer: The arguments do not fit; the contract refuses; there is no such function.
        Exception: What *post* raises, and what web3 makes of an answer that is none.
    """
    function = _function(file, AsyncWeb3(_Node(post), middleware=[], ens=cast(Any, None)))
    try:
        value = await function.call(ccip_read_enabled=False)
    except ContractLogicError:
        words = "the contract refuses the call"
    except BadFunctionCallOutput:
        words = "there is no such function at that address"
    except Web3RPCError:
        words = "the node of its chain refuses the call"
    else:
        return json.dumps(_json(value)).encode()
    raise NoAnswer(words)


def _function(file: SmartContractFile, chain: AsyncWeb3[Any]) -> AsyncContractFunction:
    try:
        inputs = file.abi.get("inputs", ())
        if set(file.arguments) <= {each["name"] for each in inputs}:
            values = [_argument(each, file.arguments[each["name"]]) for each in inputs]
            contract = chain.eth.contract(chain.to_checksum_address(file.address), abi=cast(Any, [dict(file.abi)]))
            return contract.functions[file.abi["name"]](*values)
    except Exception:  # noqa: S110 - of any kind: web3, eth-abi and a wrong ABI have many, and quote the values
        pass
    raise NoAnswer("its arguments do not fit its function")


def _argument(declared: Mapping[str, Any], value: Any) -> Any:
    """A value of JSON as eth-abi takes one of the type *declared* in the ABI."""
    kind: str = declared["type"]
    if kind.endswith("]"):
        inner = {**declared, "type": kind[: kind.rindex("[")]}
        return [_argument(inner, each) for each in value]
    if kind == "tuple":
        parts = declared["components"]
        values = [value[part["name"]] for part in parts] if isinstance(value, Mapping) else value
        return tuple(_argument(part, each) for part, each in zip(parts, values, strict=True))
    if kind == "address":
        return AsyncWeb3.to_checksum_address(value)
    if kind.startswith(("uint", "int")) and isinstance(value, str):
        return int(value, 0)
    return value


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    if isinstance(value, int) and abs(value) > LARGEST_SAFE:
        return str(value)
    return value
