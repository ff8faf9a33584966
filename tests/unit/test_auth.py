"""Bearer tokens: who gets in, as whom, and which token files are refused."""

from pathlib import Path

import pytest

from splitsam.common.auth import DEFAULT_TENANT, Authenticator
from splitsam.common.errors import Unauthenticated
from splitsam.common.settings import SettingsProblem

ACME, ACME_SECOND, GLOBEX = "acme-token-0123456789", "acme-token-9876543210", "globex-token-0123456"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who may call\n\nacme {ACME}\nglobex\t{GLOBEX}\nacme   {ACME_SECOND}  \n", encoding="utf-8")
    return path


def test_everybody_is_the_default_tenant_without_a_file():
    authenticator = Authenticator.from_file(None)
    assert authenticator.tenant({}) == DEFAULT_TENANT
    assert authenticator.tenant({"authorization": "Bearer anything"}) == DEFAULT_TENANT


@pytest.mark.parametrize(("token", "tenant"), [(ACME, "acme"), (ACME_SECOND, "acme"), (GLOBEX, "globex")])
def test_a_known_token_names_its_tenant(tokens: Path, token: str, tenant: str):
    authenticator = Authenticator.from_file(tokens)
    assert authenticator.tenant({"authorization": f"Bearer {token}"}) == tenant
    assert authenticator.tenant({"authorization": f"bearer {token}"}) == tenant


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        ACME,
        f"Basic {ACME}",
        f"Bearer {ACME[:-1]}",
        f"Bearer {ACME}x",
        "Bearer tökén",
        b"x",
    ],
)
def test_no_or_an_unknown_token_is_refused_without_repeating_it(tokens: Path, value: str | bytes | None):
    metadata = {} if value is None else {"authorization": value}
    with pytest.raises(Unauthenticated) as caught:
        Authenticator.from_file(tokens).tenant(metadata)
    assert ACME[:-1] not in caught.value.message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no token"),
        (b"# nobody\n", "holds no token"),
        (b"acme\n", "line 1"),
        (f"acme {ACME}\nglobex {GLOBEX} extra\n".encode(), "line 2"),
        (b"acme short-token\n", "line 1"),
        (f"acme {ACME}\n\nglobex {ACME}\n".encode(), "line 3"),
        (b"acme \xff\xfe-token-0123456789\n", "tokens_file"),
    ],
    ids=["empty", "comments only", "no token", "three words", "short", "token of two tenants", "not UTF-8"],
)
def test_a_malformed_file_is_refused_and_no_token_shown(tmp_path: Path, content: bytes, complaint: str):
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(SettingsProblem, match=complaint) as caught:
        Authenticator.from_file(path)
    assert ACME not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(SettingsProblem, match="tokens_file"):
        Authenticator.from_file(tmp_path / "absent")
