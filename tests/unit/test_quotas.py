"""Quotas: how much a tenant gets, who is refused until when, and which files are refused."""

import asyncio
import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from splitsam.common import quotas as module
from splitsam.common.errors import QueueFull, QuotaExceeded
from splitsam.common.quotas import Quota, Quotas, read_quotas
from splitsam.common.settings import SettingsProblem


class Clock:
    now_s = 50.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def send(quotas: Quotas, tenant: str = "acme") -> None:
    with quotas.admitted(tenant):
        pass


def refused(quotas: Quotas, tenant: str = "acme") -> float:
    """How long a refused call is asked to wait."""
    with pytest.raises(QuotaExceeded) as caught:
        send(quotas, tenant)
    with pytest.raises(QuotaExceeded):
        quotas.check(tenant)
    return caught.value.retry_delay_s


def test_a_seconds_worth_may_come_at_once_and_the_rate_holds_after(clock: Clock):
    quotas = Quotas(Quota(requests_per_s=4), {}, 100)
    for _ in range(4):
        send(quotas)
    assert refused(quotas) == pytest.approx(0.25)
    clock.now_s += 0.2
    assert refused(quotas) == pytest.approx(0.05)
    clock.now_s += 0.05
    send(quotas)
    assert refused(quotas) == pytest.approx(0.25)
    clock.now_s += 3600
    for _ in range(4):
        send(quotas)
    refused(quotas)


def test_a_rate_below_one_a_second_lets_one_through(clock: Clock):
    quotas = Quotas(Quota(requests_per_s=0.1), {}, 100)
    send(quotas)
    assert refused(quotas) == pytest.approx(10)
    clock.now_s += 10
    send(quotas)


def test_a_refused_call_uses_nothing_up(clock: Clock):
    quotas = Quotas(Quota(requests_per_s=1), {}, 100)
    send(quotas)
    for _ in range(50):
        refused(quotas)
    clock.now_s += 1
    send(quotas)


def test_calls_at_once_are_counted_until_they_end_even_badly(clock: Clock):
    quotas = Quotas(Quota(requests_in_flight=2), {}, 100)
    with quotas.admitted("acme"):
        with contextlib.suppress(RuntimeError), quotas.admitted("acme"):
            clock.now_s += 8
            raise RuntimeError
        with quotas.admitted("acme"):
            assert refused(quotas) == pytest.approx(0.4)  # smoothed, and one of two ends sooner than one alone
        send(quotas)


def test_tenants_use_up_their_own_share_only(clock: Clock):
    quotas = Quotas(Quota(requests_per_s=1), {"rich": Quota(requests_per_s=3), "free": Quota()}, 100)
    send(quotas, "acme")
    refused(quotas, "acme")
    send(quotas, "globex")
    for _ in range(3):
        send(quotas, "rich")
    refused(quotas, "rich")
    for _ in range(1000):
        send(quotas, "free")


def test_without_quotas_only_the_process_has_a_limit(clock: Clock):
    quotas = Quotas(Quota(), {}, 3)
    with quotas.admitted("a"), quotas.admitted("b"), quotas.admitted("c"):
        with pytest.raises(QueueFull) as caught:
            send(quotas, "d")
        assert caught.value.retry_delay_s
    send(quotas, "d")


async def test_messages_of_a_stream_are_paced_and_counted():
    quotas = Quotas(Quota(requests_per_s=20), {}, 100)
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    for _ in range(24):
        await quotas.pace("acme")
    assert loop.time() - start_s >= 0.15  # 20 at once, then one each 50 ms
    assert refused(quotas) <= 0.051


def test_a_file_gives_tenants_quotas_of_their_own(tmp_path: Path):
    path = tmp_path / "quotas"
    path.write_text("# tenant  per second  at once\n\nacme 0.5 3\nglobex\t0  0\n")
    assert read_quotas(path) == {"acme": Quota(0.5, 3), "globex": Quota()}
    assert read_quotas(None) == {}


@pytest.mark.parametrize(
    "line",
    ["acme", "acme 1", "acme 1 2 3", "acme x 1", "acme 1 1.5", "acme -1 1", "acme 1 -1", "acme nan 1", "a 1 1\na 2 2"],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str):
    path = tmp_path / "quotas"
    path.write_text("# first\n" + line)
    with pytest.raises(SettingsProblem, match=r"^quotas_file: line [23] "):
        read_quotas(path)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(SettingsProblem, match="quotas_file"):
        read_quotas(tmp_path / "missing")
