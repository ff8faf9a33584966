"""Bearer tokens: who gets in, as whom, and which token files are refused."""

import logging
from pathlib import Path

import pytest
from certificates import SecretVolume, sample

from splitsam.common.auth import DEFAULT_TENANT, Authenticator
from splitsam.common.errors import Unauthenticated
from splitsam.common.metrics import Metrics
from splitsam.common.settings import SettingsProblem

ACME, ACME_SECOND, GLOBEX = "acme-token-0123456789", "acme-token-9876543210", "globex-token-0123456"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who may call\n\nacme {ACME}\nglobex\t{GLOBEX}\nacme   {ACME_SECOND}  \n", encoding="utf-8")
    return path


def test_everybody_is_the_default_tenant_without_a_file(metrics: Metrics):
    authenticator = Authenticator(None, metrics)
    assert authenticator.tenant({}) == DEFAULT_TENANT
    assert authenticator.tenant({"authorization": "Bearer anything"}) == DEFAULT_TENANT


@pytest.mark.parametrize(("token", "tenant"), [(ACME, "acme"), (ACME_SECOND, "acme"), (GLOBEX, "globex")])
def test_a_known_token_names_its_tenant(tokens: Path, metrics: Metrics, token: str, tenant: str):
    authenticator = Authenticator(tokens, metrics)
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
def test_no_or_an_unknown_token_is_refused_without_repeating_it(
    tokens: Path, metrics: Metrics, value: str | bytes | None
):
    metadata = {} if value is None else {"authorization": value}
    with pytest.raises(Unauthenticated) as caught:
        Authenticator(tokens, metrics).tenant(metadata)
    assert ACME[:-1] not in caught.value.message


MALFORMED = [
    (b"", "holds no token"),
    (b"# nobody\n", "holds no token"),
    (b"acme\n", "line 1"),
    (f"acme {ACME}\nglobex {GLOBEX} extra\n".encode(), "line 2"),
    (b"acme short-token\n", "line 1"),
    (f"acme {ACME}\n\nglobex {ACME}\n".encode(), "line 3"),
    (b"acme \xff\xfe-token-0123456789\n", "tokens_file"),
]
OF_MALFORMED = ["empty", "comments only", "no token", "three words", "short", "token of two tenants", "not UTF-8"]


@pytest.mark.parametrize(("content", "complaint"), MALFORMED, ids=OF_MALFORMED)
def test_a_malformed_file_is_refused_and_no_token_shown(
    tmp_path: Path, metrics: Metrics, content: bytes, complaint: str
):
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(SettingsProblem, match=complaint) as caught:
        Authenticator(path, metrics)
    assert ACME not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path, metrics: Metrics):
    with pytest.raises(SettingsProblem, match="tokens_file"):
        Authenticator(tmp_path / "absent", metrics)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def look(authenticator: Authenticator, times: int = 3) -> None:
    """As `watch` does: a change is judged when two looks have found the same."""
    assert authenticator._file is not None
    for _ in range(times):
        authenticator._file.look()


def token_reloads(metrics: Metrics) -> tuple[float, float]:
    """Taken, refused."""
    taken, refused = (sample(metrics, "splitsam_token_reloads_total", result=each) for each in ("taken", "refused"))
    return taken, refused


def test_tokens_that_are_added_and_revoked_count_from_the_second_look(
    tmp_path: Path, metrics: Metrics, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    volume = SecretVolume(tmp_path / "auth", {"tokens": f"acme {ACME}\n".encode()})
    authenticator = Authenticator(volume / "tokens", metrics)
    look(authenticator)
    assert token_reloads(metrics) == (0, 0)
    volume.put({"tokens": f"globex {GLOBEX}\n".encode()})
    look(authenticator, 1)
    assert authenticator.tenant(bearer(ACME)) == "acme"
    look(authenticator, 1)
    assert authenticator.tenant(bearer(GLOBEX)) == "globex"
    with pytest.raises(Unauthenticated):
        authenticator.tenant(bearer(ACME))
    assert token_reloads(metrics) == (1, 0)
    assert GLOBEX not in caplog.text + str([record.__dict__ for record in caplog.records])


@pytest.mark.parametrize("content", [None, *(content for content, _ in MALFORMED)], ids=["missing", *OF_MALFORMED])
def test_a_changed_file_that_is_bad_is_refused_once_and_the_old_tokens_stay(
    tmp_path: Path, metrics: Metrics, caplog: pytest.LogCaptureFixture, content: bytes | None
):
    volume = SecretVolume(tmp_path / "auth", {"tokens": f"acme {ACME_SECOND}\n".encode()})
    authenticator = Authenticator(volume / "tokens", metrics)
    volume.put({} if content is None else {"tokens": content})
    look(authenticator)
    assert token_reloads(metrics) == (0, 1)
    assert authenticator.tenant(bearer(ACME_SECOND)) == "acme"
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "old one stays" in record.message
    assert ACME not in record.problem
    volume.put({"tokens": f"acme {ACME}\n".encode()})
    look(authenticator)
    assert token_reloads(metrics) == (1, 1)
    assert authenticator.tenant(bearer(ACME)) == "acme"


def test_a_visit_ends_when_its_token_is_revoked_or_becomes_anothers(tmp_path: Path, metrics: Metrics):
    path = tmp_path / "tokens"
    path.write_text(f"acme {ACME}\nacme {ACME_SECOND}\nglobex {GLOBEX}\n")
    authenticator = Authenticator(path, metrics)
    kept, revoked, moved = (authenticator.visit(bearer(token)) for token in (ACME, ACME_SECOND, GLOBEX))
    path.write_text(f"acme {ACME}\nacme {GLOBEX}\n")
    for visit in (kept, revoked, moved):
        visit.check()
    look(authenticator)
    kept.check()
    for visit in (revoked, moved):
        for _ in range(2):
            with pytest.raises(Unauthenticated) as caught:
                visit.check()
            assert ACME_SECOND not in str(caught.value)
    assert kept.tenant == "acme"
