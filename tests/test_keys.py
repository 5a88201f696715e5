"""The provider's key: signs and decrypts as the original's clients expect, and is never shown."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import stat
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, Final
from uuid import uuid4

import ecies
import pytest
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_utils.crypto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import SecretStr

from blocks.assets import Asset, LocalAsset, parse_asset
from blocks.files import File, GraphqlFile, UrlFile, parse_files
from blocks.keys import (
    LACKS,
    CannotDecrypt,
    FilesUnavailable,
    KeyUnusable,
    Lack,
    ProviderKey,
    create_keystore,
    files_of,
    load_provider_key,
    seal_files,
)
from tests.conftest import PrefectServer
from tests.test_assets import ddo

pytestmark = pytest.mark.anyio

HEX: Final = "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"
ADDRESS: Final = "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"
KEY: Final = ProviderKey.from_secret(HEX)
OTHER: Final = ProviderKey.from_secret("0x" + "11" * 32)
PASSWORD: Final = "hush-e4da3b7fbbce"

# Encrypted to this key by eciesjs 0.4.18, another implementation of the same format: b'[{"url":"https://a.b/c"}]'.
VECTOR: Final = (
    "04a3ffe032803d6819faccdbd954ec2031e115859ea41e92bcbf248770214fcf07e63800d699120b4dd697a3361e9e65fa2d"
    "45d592716ca5ef77b06cd158f431b5f16d8f9a32b1d4d1e2488afcff483e5ab59b6231c4507cc048976a163d6dc403c9ceba"
    "b92e92bac5b359f3ad13b3a26c3991316c3cc7f47abe"
)


# The key itself.


@pytest.mark.parametrize("text", [HEX, "0x" + HEX, f" {HEX.upper()}\n"])
def test_a_key_in_hex(text: str) -> None:
    """With and without prefix; its address is checksummed."""
    assert ADDRESS == ProviderKey.from_secret(text).address


ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


@pytest.mark.parametrize(
    "text", ["", "0x", HEX[:-1], HEX + "0", "g" * 64, "0" * 64, f"{ORDER:x}", "ff" * 32, "0x0x" + HEX]
)
def test_no_key(text: str) -> None:
    """What is no key is refused, and not repeated in what is said or logged of it."""
    with pytest.raises(KeyUnusable, match="64 hex digits") as fault:
        ProviderKey.from_secret(text)
    shown = "".join(traceback.format_exception(fault.value))
    assert len(text) < 10 or text not in shown


def test_signatures_in_the_providers_scheme() -> None:
    """Over the hash of the text and not the text, and recovered by who checks them."""
    signature = KEY.sign("0xabc1700000000000")
    assert 132 == len(signature) and int(signature[-2:], 16) in (27, 28)
    message = encode_defunct(primitive=keccak(text="0xabc1700000000000"))
    assert ADDRESS == Account.recover_message(message, signature=signature)


@given(st.binary(min_size=32, max_size=32))
@settings(max_examples=20, deadline=None)
def test_signatures_in_parts(digest: bytes) -> None:
    """v, r and s of a provider fee, each of r and s in 32 bytes whatever their size."""
    v, r, s = KEY.sign_hash(digest)
    assert v in (27, 28) and 32 == len(r) == len(s)
    assert ADDRESS == Account.recover_message(encode_defunct(primitive=digest), signature=r + s + bytes([v]))


def test_a_digest_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="32"):
        KEY.sign_hash(b"\x00" * 31)


@given(st.binary(max_size=200))
@settings(max_examples=20, deadline=None)
def test_what_was_encrypted_comes_out(plain: bytes) -> None:
    assert plain == KEY.decrypt(KEY.encrypt(plain))


def test_what_others_have_encrypted() -> None:
    """With the public key alone, by the library's defaults; and the vector of another implementation."""
    assert b"theirs" == KEY.decrypt(ecies.encrypt(KEY.public_key, b"theirs"))
    assert b"ours" == ecies.decrypt(HEX, KEY.encrypt(b"ours"))
    assert b'[{"url":"https://a.b/c"}]' == KEY.decrypt(bytes.fromhex(VECTOR))


@given(st.binary(max_size=150))
@settings(max_examples=50, deadline=None)
def test_what_is_not_encrypted_to_it(text: bytes) -> None:
    """Anything else is one kind of fault, never another library's."""
    for encrypted in (text, OTHER.encrypt(text), KEY.encrypt(text)[:-1], KEY.encrypt(text)[:-1] + b"\x00\x00"):
        with pytest.raises(CannotDecrypt):
            KEY.decrypt(encrypted)


def test_the_key_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    """Not by its repr, in a log, by vars or its state, and it is not copied into another process."""
    logging.getLogger("test").warning("%s %r", KEY, KEY)
    shown = f"{KEY} {KEY!r} {[KEY]} {KEY.__getstate__()} {caplog.text} {dir(KEY)}"
    assert ADDRESS in repr(KEY)
    assert HEX not in shown and repr(bytes.fromhex(HEX)) not in shown and str(int(HEX, 16)) not in shown
    with pytest.raises(TypeError):
        vars(KEY)
    for taken in (pickle.dumps, copy.copy, copy.deepcopy, lambda key: pickle.dumps({"key": key}, protocol=2)):
        with pytest.raises(TypeError, match="not copied or pickled"):
            taken(KEY)


# Keystores.


@pytest.fixture(scope="module")
def keystore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "deep" / "keystore.json"
    create_keystore(path, PASSWORD, random_password=True)
    return path


def test_a_keystore_is_made_once(keystore: Path) -> None:
    """Readable by its user alone; made again, it stays as it is; nothing else is left lying there."""
    before = keystore.read_bytes()
    create_keystore(keystore, "another")
    assert before == keystore.read_bytes()
    assert 0o600 == stat.S_IMODE(keystore.stat().st_mode)
    assert [keystore] == list(keystore.parent.iterdir())
    stored = json.loads(before)
    assert stored["address"].lower() == ProviderKey.from_keystore(keystore, PASSWORD).address.lower()[2:]


def test_a_password_somebody_chose(tmp_path: Path) -> None:
    """Costs whoever guesses it memory and time; one that cannot be guessed costs nobody."""
    create_keystore(tmp_path / "a", "chosen")
    create_keystore(tmp_path / "b", PASSWORD, random_password=True)
    chosen, random = (json.loads((tmp_path / name).read_text())["crypto"] for name in "ab")
    assert ("scrypt", 262_144) == (chosen["kdf"], chosen["kdfparams"]["n"])
    assert ("pbkdf2", 1024) == (random["kdf"], random["kdfparams"]["c"])
    assert ProviderKey.from_keystore(tmp_path / "a", "chosen").address
    with pytest.raises(ValueError, match="password"):
        create_keystore(tmp_path / "c", "")


def test_makers_at_the_same_moment(tmp_path: Path) -> None:
    """All find one whole key."""
    barrier = Barrier(4)

    def make() -> str:
        barrier.wait()
        create_keystore(tmp_path / "k", PASSWORD, random_password=True)
        return ProviderKey.from_keystore(tmp_path / "k", PASSWORD).address

    with ThreadPoolExecutor(4) as pool:
        assert 1 == len({future.result() for future in [pool.submit(make) for _ in range(4)]})


def _changed(**changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda stored: json.dumps({**stored, **changes})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda stored: "no json", "not JSON"),
        (lambda stored: "[" * 100_000, "not JSON"),
        (lambda stored: "[]", "no keystore"),
        (_changed(version=4), "no keystore"),
        (_changed(crypto=None), "no keystore"),
        (_changed(crypto={}), "damaged"),
        (lambda stored: json.dumps({**stored, "crypto": {**stored["crypto"], "mac": "zz"}}), "damaged"),
        (lambda stored: json.dumps({**stored, "crypto": {**stored["crypto"], "mac": "00" * 32}}), "password"),
        (lambda stored: json.dumps({**stored, "crypto": {**stored["crypto"], "kdf": "md5"}}), "damaged"),
    ],
)
def test_a_file_that_is_no_keystore(
    keystore: Path, tmp_path: Path, change: Callable[[dict[str, Any]], str], says: str
) -> None:
    """Says which file and what is wrong with it."""
    path = tmp_path / "wrong.json"
    path.write_text(change(json.loads(keystore.read_text())))
    with pytest.raises(KeyUnusable, match=says) as fault:
        ProviderKey.from_keystore(path, PASSWORD)
    assert "wrong.json" in str(fault.value) and PASSWORD not in "".join(traceback.format_exception(fault.value))


async def load(
    block: str | None = None, keystore: Path | None = None, password: Path | None = None
) -> ProviderKey | None:
    return await load_provider_key(block=block, keystore=keystore, password_file=password)


@pytest.fixture(scope="module")
def stored(keystore: Path) -> str:
    return keystore.read_text("utf-8")


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    return path


async def test_the_key_of_a_keystore(keystore: Path, password_file: Path) -> None:
    """With the password of a file, its line end aside; nothing set is no key."""
    loaded = await load(None, keystore, password_file)
    assert loaded is not None and ProviderKey.from_keystore(keystore, PASSWORD).address == loaded.address
    assert await load() is None
    assert await load(password=password_file) is None


async def test_keys_that_cannot_be_had(keystore: Path, password_file: Path, tmp_path: Path) -> None:
    """Each says which file, and nothing of the password."""
    wrong, empty, binary = tmp_path / "wrong", tmp_path / "empty", tmp_path / "binary"
    wrong.write_text("hush-wrong")
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\xff")
    for block, store, password, says in (
        ("b", keystore, password_file, "both set"),
        (None, keystore, None, "keystore.json: no file with its password"),
        (None, keystore, tmp_path / "none", "none: it cannot be read"),
        (None, keystore, empty, "empty: it is empty"),
        (None, keystore, binary, "binary: it is not text"),
        (None, keystore, wrong, "keystore.json: the password is not"),
        (None, tmp_path / "nothing", password_file, "nothing: it cannot be read"),
        (None, tmp_path, password_file, "cannot be read"),
    ):
        with pytest.raises(KeyUnusable, match=says) as fault:
            await load(block, store, password)
        shown = "".join(traceback.format_exception(fault.value))
        assert "hush-wrong" not in shown and PASSWORD not in shown


@pytest.fixture
def prefect(prefect_server: PrefectServer) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_server.api}):
        yield


async def saved(value: Any) -> str:
    name = f"t{uuid4().hex[:8]}"
    secret: Secret[Any] = Secret(value=value)
    await secret.asave(name)
    return name


@pytest.mark.server
async def test_the_key_of_a_block(prefect: None, keystore: Path, stored: str, password_file: Path) -> None:
    """In hex, also one that looks like a number; or a keystore's object, as text or as JSON."""
    kept = ProviderKey.from_keystore(keystore, PASSWORD).address
    for value, expected in (
        (SecretStr(HEX), ADDRESS),
        (SecretStr("1" * 64), ProviderKey.from_secret("1" * 64).address),
        (SecretStr(stored), kept),
        (json.loads(stored), kept),
    ):
        loaded = await load(await saved(value), None, password_file)
        assert loaded is not None and expected == loaded.address


@pytest.mark.server
async def test_blocks_that_hold_no_key(prefect: None, stored: str) -> None:
    """Each says which block, and nothing of what it holds."""
    for value, says in (
        (SecretStr("hush-nothing"), "no private key"),
        (SecretStr("{hush-nothing"), "neither a key"),
        ({"hush-nothing": 1}, "no file with its password"),
        ([1, 2], "no private key"),
        (json.loads(stored), "no file with its password"),
    ):
        name = await saved(value)
        with pytest.raises(KeyUnusable, match=f"secret/{name}: .*{says}") as fault:
            await load(name)
        assert "hush-nothing" not in "".join(traceback.format_exception(fault.value))
    with pytest.raises(KeyUnusable, match="secret/nowhere: there is no such block"):
        await load("nowhere")


async def test_a_block_without_a_server() -> None:
    """A server that is not there, or not set at all, is said to be the trouble."""
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), pytest.raises(KeyUnusable, match="secret/b"):
        await load("b")
    with pytest.raises(KeyUnusable, match="secret/b: it cannot be read"):
        await load("b")


# Files of an asset.

FILES: Final[tuple[File, ...]] = (
    UrlFile(url="https://example.org/a.csv?token=hush-files", headers={"X-Key": "hush-files"}),
    GraphqlFile(type="graphql", url="https://example.org/q", query="{ hush }"),
)
NFT: Final = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
DATATOKEN: Final = "0x9fE46736679d2D9a65F0992F2272dE9f3c7fa6e0"


def with_files(files: Any, kind: type[Asset] = Asset, **changes: Any) -> Asset:
    document = {**ddo(), **changes}
    document["services"][1]["files"] = files
    return parse_asset(document, kind)


def opened(asset: Asset, key: ProviderKey | None = KEY) -> tuple[File, ...]:
    return files_of(asset, asset.services[1], key)


def encrypted(plain: Any) -> str:
    return "0x" + KEY.encrypt(plain if isinstance(plain, bytes) else json.dumps(plain).encode()).hex()


def envelope(**changes: Any) -> dict[str, Any]:
    files = [{"type": "url", "url": "https://example.org/a.csv", "method": "GET"}]
    return {"nftAddress": NFT, "datatokenAddress": DATATOKEN, "files": files, **changes}


@pytest.mark.parametrize("kind", [Asset, LocalAsset])
def test_sealed_files_come_out(kind: type[Asset]) -> None:
    """As they went in, with prefix and without, whatever the case of the addresses."""
    sealed = seal_files(FILES, key=KEY, nft_address=NFT.lower(), datatoken=DATATOKEN.upper().replace("X", "x"))
    assert "hush" not in sealed
    assert FILES == opened(with_files(sealed, kind)) == opened(with_files(sealed.removeprefix("0x"), kind))


def test_files_as_clients_encrypt_them() -> None:
    assert ("https://example.org/a.csv",) == tuple(
        file.url for file in opened(with_files(encrypted(envelope()))) if isinstance(file, UrlFile)
    )


LIST: Final = [{"url": "https://example.org/old.csv"}]


@pytest.mark.parametrize("files", [LIST, encrypted(LIST)], ids=["in clear", "older list"])
def test_files_that_only_the_own_catalogue_may_have(files: Any) -> None:
    """In clear, or encrypted without saying to which asset: taken from the own catalogue and from nowhere else."""
    assert parse_files(LIST) == opened(with_files(files, LocalAsset))
    with pytest.raises(FilesUnavailable) as fault:
        opened(with_files(files))
    assert fault.value.lack in (Lack.IN_CLEAR, Lack.NOT_BOUND)


@pytest.mark.parametrize(
    ("files", "lack"),
    [
        (None, Lack.NO_FILES),
        ("", Lack.NO_FILES),
        ([], Lack.NO_FILES),
        (encrypted(envelope(files=[])), Lack.NO_FILES),
        (encrypted({"nftAddress": NFT, "datatokenAddress": DATATOKEN}), Lack.NO_FILES),
        ("hush-files", Lack.NOT_FOR_US),
        ("0x", Lack.NOT_FOR_US),
        ("0xabcdef", Lack.NOT_FOR_US),
        ("0x" + OTHER.encrypt(b"[]").hex(), Lack.NOT_FOR_US),
        (encrypted(b"hush-files"), Lack.BAD_FILE),
        (encrypted(b"[" * 100_000), Lack.BAD_FILE),
        (encrypted("hush-files"), Lack.BAD_FILE),
        (encrypted(envelope(files="hush-files")), Lack.BAD_FILE),
        (encrypted(envelope(files=[{"type": "hush-files"}])), Lack.BAD_FILE),
        (encrypted(envelope(files=[{"url": ["hush-files"]}])), Lack.BAD_FILE),
        (encrypted(envelope(nftAddress=DATATOKEN)), Lack.WRONG_NFT),
        (encrypted(envelope(nftAddress="")), Lack.WRONG_NFT),
        (encrypted(envelope(datatokenAddress=NFT)), Lack.WRONG_DATATOKEN),
        (encrypted(envelope(datatokenAddress=None)), Lack.NOT_BOUND),
        (encrypted({"files": LIST}), Lack.NOT_BOUND),
    ],
)
@pytest.mark.parametrize("kind", [Asset, LocalAsset])
def test_files_that_cannot_be_had(files: Any, lack: Lack, kind: type[Asset]) -> None:
    """A word why, and nothing of the files."""
    with pytest.raises(FilesUnavailable) as fault:
        opened(with_files(files, kind))
    assert lack == fault.value.lack
    assert "hush-files" not in "".join(traceback.format_exception(fault.value))


def test_a_provider_without_a_key() -> None:
    with pytest.raises(FilesUnavailable) as fault:
        opened(with_files(encrypted(envelope())), None)
    assert Lack.NO_KEY == fault.value.lack


def test_files_of_an_asset_without_a_chain() -> None:
    """Bound to nothing, they are good at home only: anybody could publish an asset that belongs to nothing."""
    nowhere: dict[str, Any] = {
        "nftAddress": "",
        "services": [{"id": "a", "type": "access"}, {"id": "b", "type": "compute"}],
    }
    sealed = seal_files(FILES, key=KEY, nft_address="", datatoken="")
    assert FILES == opened(with_files(sealed, LocalAsset, **nowhere))
    with pytest.raises(FilesUnavailable) as fault:
        opened(with_files(sealed, **nowhere))
    assert Lack.WRONG_NFT == fault.value.lack


def test_every_lack_has_a_text() -> None:
    assert set(Lack) == set(LACKS)
