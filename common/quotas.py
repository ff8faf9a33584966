"""What one tenant may ask for: requests a second, and requests at once; and how many calls the process takes in all."""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from splitsam.common.errors import QueueFull, QuotaExceeded, bounded_retry_s
from splitsam.common.settings import ServiceSettings, SettingsProblem, read_words

_SMOOTHING = 0.1
_ROUNDING_S = 1e-6


@dataclass(frozen=True)
class Quota:
    """A tenant's share; 0 is no limit.

    Args:
        requests_per_s: on average; a second's worth may come at once.
        requests_in_flight: calls and streams in progress.
    """

    requests_per_s: float = 0.0
    requests_in_flight: int = 0


@dataclass
class _Use:
    """What a tenant has used.

    Args:
        paid_until_s: when its requests so far would have ended at exactly the rate of its quota.
        call_s: about how long its calls take.
    """

    running: int = 0
    paid_until_s: float = 0.0
    call_s: float = 0.0


class Quotas:
    """Admits calls within the quotas of their tenants.

    Args:
        by_tenant: quotas of their own, instead of the default.
        max_calls: of all tenants, in progress at once.
    """

    def __init__(self, default: Quota, by_tenant: Mapping[str, Quota], max_calls: int):
        self._default = default
        self._by_tenant = dict(by_tenant)
        self._max_calls = max_calls
        self._uses: dict[str, _Use] = {}
        self._running = 0

    @classmethod
    def from_settings(cls, settings: ServiceSettings) -> "Quotas":
        """Raises SettingsProblem if the quotas file cannot be read."""
        default = Quota(settings.tenant_requests_per_s, settings.tenant_requests_in_flight)
        return cls(default, read_quotas(settings.quotas_file), settings.max_requests_in_flight)

    def check(self, tenant: str) -> None:
        """Do nothing if a call would be admitted.

        Raises:
            QuotaExceeded: the tenant has used its share; says when there will be more.
            QueueFull: the process has too many calls in progress.
        """
        quota, use = self._of(tenant)
        if self._running >= self._max_calls:
            raise QueueFull(f"{self._max_calls} calls are in progress already", retry_delay_s=1.0)
        if quota.requests_in_flight and use.running >= quota.requests_in_flight:
            message = f"{quota.requests_in_flight} requests of this tenant are in progress, as many as may be"
            raise QuotaExceeded(message, retry_delay_s=bounded_retry_s(use.call_s / use.running))
        if (wait_s := _wait_s(quota, use)) > _ROUNDING_S:
            message = f"this tenant may send {quota.requests_per_s:g} requests a second"
            raise QuotaExceeded(message, retry_delay_s=bounded_retry_s(wait_s))

    @contextlib.contextmanager
    def admitted(self, tenant: str) -> Iterator[None]:
        """Around a call; raises as `check` does."""
        self.check(tenant)
        quota, use = self._of(tenant)
        _pay(quota, use)
        self._running += 1
        use.running += 1
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._running -= 1
            use.running -= 1
            use.call_s += _SMOOTHING * (time.monotonic() - start_s - use.call_s)

    async def pace(self, tenant: str) -> None:
        """Wait until the tenant may send another message on a stream, which counts as a request."""
        quota, use = self._of(tenant)
        wait_s = _wait_s(quota, use)
        _pay(quota, use)
        await asyncio.sleep(max(0.0, wait_s))

    def _of(self, tenant: str) -> tuple[Quota, _Use]:
        return self._by_tenant.get(tenant, self._default), self._uses.setdefault(tenant, _Use())


def read_quotas(path: Path | None) -> dict[str, Quota]:
    """Read lines of `tenant requests_per_s requests_in_flight`; blank lines and those that begin with # are skipped.

    Raises:
        SettingsProblem: the file is missing, or a line is not of that form.
    """
    if path is None:
        return {}
    quotas: dict[str, Quota] = {}
    for number, words in read_words("quotas_file", path):
        try:
            tenant, per_s, in_flight = words
            quota = Quota(float(per_s), int(in_flight))
            if tenant in quotas or not 0 <= quota.requests_per_s <= 10**6 or quota.requests_in_flight < 0:
                raise ValueError
        except ValueError:
            message = "is not 'tenant requests_per_s requests_in_flight' of a new tenant, 0 for no limit"
            raise SettingsProblem(f"quotas_file: line {number} {message}") from None
        quotas[tenant] = quota
    return quotas


def _wait_s(quota: Quota, use: _Use) -> float:
    """Until the next request is within the rate; a second's worth, or one request, may be ahead of it."""
    if not quota.requests_per_s:
        return 0.0
    ahead_s = max(1.0, 1 / quota.requests_per_s)
    return use.paid_until_s + 1 / quota.requests_per_s - ahead_s - time.monotonic()


def _pay(quota: Quota, use: _Use) -> None:
    if quota.requests_per_s:
        use.paid_until_s = max(use.paid_until_s, time.monotonic()) + 1 / quota.requests_per_s
