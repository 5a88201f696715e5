"""What an operator may set, and what the service refuses to start with."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from api.settings import Settings, is_loopback
from tests.factories import ADMIN, PROVIDER, settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "c2d.example.com"])
def test_an_open_operator_is_refused_unless_told_in_so_many_words(tmp_path: Path, host: str) -> None:
    """With no list of providers it listens on loopback, or does not start."""
    with pytest.raises(ValidationError, match="C2D_ALLOW_OPEN_OPERATOR"):
        settings(tmp_path, host=host)
    settings(tmp_path, host=host, allow_open_operator=True)
    settings(tmp_path, host=host, providers=[PROVIDER.address])


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.8.9.1", True), ("::1", True), ("localhost.evil.com", False), ("", False)],
)
def test_loopback_is_an_address_or_localhost(host: str, expected: bool) -> None:
    """A name that points here today may point elsewhere tomorrow."""
    assert expected is is_loopback(host)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Addresses separated by commas or blanks, whatever their case."""
    for name, value in {
        "PROVIDERS": f"{PROVIDER.address}, {ADMIN.address}",
        "KEY_FILE": str(tmp_path / "key"),
        "NONCE_DATABASE": "sqlite+aiosqlite://",
        "CHAINS": '[{"id": 8996, "rpc": "http://127.0.0.1:8545/secret"}]',
    }.items():
        monkeypatch.setenv(f"C2D_{name}", value)
    made = Settings()
    assert {PROVIDER.address.lower(), ADMIN.address.lower()} == made.providers
    assert [8996] == [chain.id for chain in made.chains]
    assert "secret" not in repr(made), "the URL of a node carries its key"


def test_an_address_that_is_none_is_refused(tmp_path: Path) -> None:
    """A provider that was mistyped would be a list that lets nobody in."""
    with pytest.raises(ValidationError):
        settings(tmp_path, providers="0x1234")
