"""
The provider's key, and the files of assets that are encrypted to it. Contract, sections 5 and 7.

Signatures and encryption are those of the original Provider, so that its clients check the ones and write the
other: EIP-191 over a keccak hash; ECIES on secp256k1 as ``eciespy`` does it by default.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NoReturn

import ecies
import httpx
from ecies.config import Config
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount
from eth_utils.crypto import keccak
from prefect.blocks.system import Secret
from prefect.exceptions import ObjectNotFound, PrefectException
from pydantic_core import from_json

from blocks.assets import Asset, AssetService, LocalAsset
from blocks.files import BadFile, File, parse_files

# py_ecc, which comes with eth_account, raises this to 100,000, in the API and in every flow: reading a document
# nested that deep would end the process by stack overflow instead of raising.
sys.setrecursionlimit(min(sys.getrecursionlimit(), 1_000))

# Written out although they are eciespy's defaults: they are the format of what others have encrypted to us.
_ECIES: Final = Config(
    elliptic_curve="secp256k1",
    is_ephemeral_key_compressed=False,
    is_hkdf_key_compressed=False,
    symmetric_algorithm="aes-256-gcm",
    symmetric_nonce_length=16,
)
_HEX_KEY: Final = re.compile(r"(?:0x)?[0-9a-fA-F]{64}")
_WORTHLESS_ITERATIONS: Final = 1024


class KeyUnusable(Exception):
    """There is no key to be had as it was set. Says where and what is wrong, and nothing of key or password."""


class CannotDecrypt(Exception):
    """Not encrypted to this key, or altered."""


class ProviderKey:
    """
    A private key that signs and decrypts and is never shown.

    It has no ``vars``, its repr is its address, and it refuses to be pickled, so that it ends up in no log, no
    result and no other process.
    """

    __slots__ = ("_account",)

    def __init__(self, account: LocalAccount) -> None:
        self._account = account

    @classmethod
    def from_secret(cls, secret: str) -> ProviderKey:
        """
        *secret*: 64 hex digits, with or without 0x, blanks around them ignored.

        Raises:
            KeyUnusable
        """
        text = secret.strip()
        if _HEX_KEY.fullmatch(text):
            # Zero, and numbers beyond the order of the curve, are no keys; the library says so in several ways.
            with suppress(Exception):
                return cls(Account.from_key(text))
        raise KeyUnusable("it is no private key: 64 hex digits are needed")

    @classmethod
    def from_keystore(cls, path: Path, password: str) -> ProviderKey:
        """
        From a file in the Web3 secret storage format, version 3. Takes up to seconds, by what the file asks for.

        Raises:
            KeyUnusable
        """
        try:
            stored = json.loads(path.read_bytes())
        except OSError as fault:
            raise KeyUnusable(f"{path}: it cannot be read ({fault.strerror})") from None
        except (ValueError, RecursionError):
            raise KeyUnusable(f"{path}: it is not JSON") from None
        try:
            return cls._unlocked(stored, password)
        except KeyUnusable as fault:
            raise KeyUnusable(f"{path}: {fault}") from None

    @classmethod
    def _unlocked(cls, stored: Any, password: str) -> ProviderKey:
        lowered = {str(name).lower(): value for name, value in stored.items()} if isinstance(stored, Mapping) else {}
        # Version 4 holds a BLS key, which would be decrypted and then signs for another address.
        if lowered.get("version") != 3 or not isinstance(lowered.get("crypto"), Mapping):
            raise KeyUnusable("it is no keystore of version 3")
        try:
            secret = Account.decrypt(dict(stored), password)
        except ValueError as fault:
            wrong = "MAC" in str(fault)
            raise KeyUnusable("the password is not that of this keystore" if wrong else "it is damaged") from None
        except Exception as fault:  # the library lets whatever a field lacks or is escape
            raise KeyUnusable(f"it is damaged ({type(fault).__name__})") from None
        return cls.from_secret(bytes(secret).hex())

    @property
    def address(self) -> str:
        """With the checksum in its case (EIP-55)."""
        return str(self._account.address)

    @property
    def public_key(self) -> str:
        """0x and 128 hex digits: what others encrypt to."""
        return str(self._account._key_obj.public_key.to_hex())

    def sign(self, message: str) -> str:
        """0x and 130 hex digits over *message*, in the Provider scheme; contract, section 5. v is 27 or 28."""
        signed = self._account.sign_message(encode_defunct(primitive=keccak(text=message)))
        return "0x" + bytes(signed.signature).hex()

    def sign_hash(self, digest: bytes) -> tuple[int, bytes, bytes]:
        """v (27 or 28), r and s (32 bytes each) by EIP-191 over the 32 bytes of *digest*; for provider fees."""
        if len(digest) != 32:
            raise ValueError("a digest has 32 bytes")
        signed = self._account.sign_message(encode_defunct(primitive=digest))
        return signed.v, signed.r.to_bytes(32, "big"), signed.s.to_bytes(32, "big")

    def encrypt(self, plain: bytes) -> bytes:
        return ecies.encrypt(self.public_key, plain, _ECIES)

    def decrypt(self, encrypted: bytes) -> bytes:
        """Raises CannotDecrypt."""
        try:
            return ecies.decrypt(bytes(self._account.key), encrypted, _ECIES)
        except ValueError:
            raise CannotDecrypt("it is not encrypted to this provider's key, or was altered") from None

    def __repr__(self) -> str:
        return f"ProviderKey({self.address})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a provider's key is not copied or pickled")


def create_keystore(path: Path, password: str, *, random_password: bool = False) -> None:
    """
    Make a new key, readable by its user alone; an existing file stays as it is. Safe to repeat.

    *random_password*: the password is itself a random key of 128 bits or more. Slow derivation only makes the
    guessing of passwords dear, and such a one cannot be guessed; every start would wait for nothing.
    """
    if not password:
        raise ValueError("a keystore needs a password")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists():
        return
    derivation: dict[str, Any] = (
        {"kdf": "pbkdf2", "iterations": _WORTHLESS_ITERATIONS} if random_password else {"kdf": "scrypt"}
    )
    stored = Account.encrypt(Account.create().key, password, **derivation)
    # Linked into place when it is whole: whoever starts at the same moment finds no file or one with a key in it.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
    whole = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(stored, file)
        with suppress(FileExistsError):
            path.hardlink_to(whole)
    finally:
        whole.unlink()


async def load_provider_key(
    *, block: str | None, keystore: Path | None, password_file: Path | None
) -> ProviderKey | None:
    """
    The key an operator has set, or None if none is.

    *block*: name of a Prefect block of type Secret, which holds the key in hex, or a keystore's JSON object whose
    password is in *password_file*. *keystore*: a keystore file whose password is there. One line end after the
    password is not part of it.

    Raises:
        KeyUnusable: Also where both are set: which of two identities is meant cannot be guessed.
    """
    if block and keystore:
        raise KeyUnusable(f"the block {block} and the keystore {keystore} are both set; set one of them")
    if block:
        stored = await _secret_of(block)
        try:
            return await asyncio.to_thread(_from_block, stored, password_file)
        except KeyUnusable as fault:
            raise KeyUnusable(f"block secret/{block}: {fault}") from None
    if keystore:
        return await asyncio.to_thread(
            lambda: ProviderKey.from_keystore(keystore, _password(password_file, f"{keystore}: "))
        )
    return None


async def _secret_of(block: str) -> Any:
    fault: Exception
    try:
        # Not `.get()`: it reads text as JSON, and a key in hex may look like a number.
        secret: Secret[Any] = await Secret.aload(block)
        return secret.value.get_secret_value()
    except ValueError as raised:
        missing = isinstance(raised.__cause__, ObjectNotFound)
        fault = raised
    except (PrefectException, httpx.HTTPError, OSError) as raised:
        missing = False
        fault = raised
    why = "there is no such block" if missing else f"it cannot be read ({type(fault).__name__})"
    raise KeyUnusable(f"block secret/{block}: {why}")


def _from_block(stored: Any, password_file: Path | None) -> ProviderKey:
    if isinstance(stored, str) and stored.lstrip().startswith("{"):
        try:
            stored = json.loads(stored)
        except (ValueError, RecursionError):
            raise KeyUnusable("it holds neither a key in hex nor the JSON of a keystore") from None
    if isinstance(stored, Mapping):
        return ProviderKey._unlocked(stored, _password(password_file, "it holds a keystore, "))
    return ProviderKey.from_secret(stored if isinstance(stored, str) else "")


def _password(path: Path | None, what: str) -> str:
    if path is None:
        raise KeyUnusable(f"{what}no file with its password is set")
    try:
        password = path.read_text("utf-8").removesuffix("\n").removesuffix("\r")
    except OSError as fault:
        raise KeyUnusable(f"password file {path}: it cannot be read ({fault.strerror})") from None
    except ValueError:
        raise KeyUnusable(f"password file {path}: it is not text") from None
    if not password:
        raise KeyUnusable(f"password file {path}: it is empty")
    return password


class Lack(StrEnum):
    """Why the files of an asset cannot be had."""

    NO_FILES = "no-files"
    IN_CLEAR = "in-clear"
    NO_KEY = "no-key"
    NOT_FOR_US = "not-encrypted-to-this-provider"
    NOT_BOUND = "not-bound-to-an-asset"
    WRONG_NFT = "mismatch-of-nft"
    WRONG_DATATOKEN = "mismatch-of-datatoken"
    BAD_FILE = "bad-file"


LACKS: Final = {
    Lack.NO_FILES: "the service has no files",
    Lack.IN_CLEAR: "the files are in clear in a document that is public",
    Lack.NO_KEY: "the files are encrypted and this provider has no key",
    Lack.NOT_FOR_US: "the files are not encrypted to this provider",
    Lack.NOT_BOUND: "the files do not say which asset they belong to",
    Lack.WRONG_NFT: "the files belong to another NFT",
    Lack.WRONG_DATATOKEN: "the files belong to another datatoken",
    Lack.BAD_FILE: "a file is not described as it should be",
}


class FilesUnavailable(Exception):
    """The files of an asset cannot be had; *lack* is the word why. Nothing of them is in the text."""

    def __init__(self, lack: Lack) -> None:
        self.lack = lack
        super().__init__(LACKS[lack])


def files_of(asset: Asset, service: AssetService, key: ProviderKey | None) -> tuple[File, ...]:
    """
    The files of one of *asset*'s services, decrypted with *key* where they are encrypted.

    Encrypted files carry the addresses of the NFT and the datatoken they belong to: without them anybody could
    copy the text, which is public, into an asset of his own with rules of his own. So files in clear, and the
    plain list that older assets encrypted, are taken only from this house's own catalogue (``LocalAsset``).

    Raises:
        FilesUnavailable
    """
    if not service.files:
        raise FilesUnavailable(Lack.NO_FILES)
    local = isinstance(asset, LocalAsset)
    if not isinstance(service.files, str):
        if not local:
            raise FilesUnavailable(Lack.IN_CLEAR)
        return _parsed(service.files)
    if key is None:
        raise FilesUnavailable(Lack.NO_KEY)
    opened = _opened(service.files, key)
    if isinstance(opened, list):
        if not local:
            raise FilesUnavailable(Lack.NOT_BOUND)
        return _parsed(opened)
    if not isinstance(opened, Mapping):
        raise FilesUnavailable(Lack.BAD_FILE)
    _check_bound(opened.get("nftAddress"), asset.nft_address, local, Lack.WRONG_NFT)
    _check_bound(opened.get("datatokenAddress"), service.datatoken, local, Lack.WRONG_DATATOKEN)
    return _parsed(opened.get("files") or ())


def _opened(encrypted: str, key: ProviderKey) -> Any:
    try:
        plain = key.decrypt(bytes.fromhex(encrypted.removeprefix("0x")))
    except (CannotDecrypt, ValueError):
        raise FilesUnavailable(Lack.NOT_FOR_US) from None
    try:
        # Anybody can encrypt to us, also what is nested deeper than json takes without ending the process.
        return from_json(plain)
    except ValueError:
        raise FilesUnavailable(Lack.BAD_FILE) from None


def _check_bound(said: Any, expected: str, local: bool, mismatch: Lack) -> None:
    if not isinstance(said, str):
        raise FilesUnavailable(Lack.NOT_BOUND)
    # Nothing equals nothing only at home: files of an asset without a chain are bound by standing in its file.
    if said.lower() != expected.lower() or not (said or local):
        raise FilesUnavailable(mismatch)


def _parsed(files: Any) -> tuple[File, ...]:
    try:
        parsed = parse_files(files)
    except BadFile:
        raise FilesUnavailable(Lack.BAD_FILE) from None
    if not parsed:
        raise FilesUnavailable(Lack.NO_FILES)
    return parsed


def seal_files(files: Iterable[File], *, key: ProviderKey, nft_address: str, datatoken: str) -> str:
    """
    ``files`` of a service as they are published: 0x and hex, encrypted to *key* and bound to the two addresses.

    Both are empty for an asset without a chain.
    """
    document = {
        "nftAddress": nft_address,
        "datatokenAddress": datatoken,
        "files": [file.model_dump(mode="json", by_alias=True) for file in files],
    }
    return "0x" + key.encrypt(json.dumps(document).encode()).hex()
