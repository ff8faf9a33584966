"""One fault under load: inject it, end it, wait until all is as before, and count what the callers saw."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from bench.faults.deployment import Deployment
from bench.faults.load import RIGHT_IOU, KnownImage, Load, Outcome
from bench.faults.rows import Row
from bench.faults.stages import Stage, plain

_BEFORE_S = 2.0
_SETTLED = 4  # operations of each kind in a row without a failure, until which the load goes on
_NORMAL_LIMIT_S = 60.0
_POLL_S = 0.05
Inject = Callable[[Deployment], AbstractContextManager[None]]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with a running deployment.

    Args:
        name: of the row.
        inject: a context manager around the time in which it is wrong; its exit ends the fault.
        stage: the deployment that it happens to.
        hold_s: how long it stays wrong.
    """

    name: str
    inject: Inject
    stage: Stage = plain
    hold_s: float = 4.0


def measure(fault: Fault, deployment: Deployment, known: Sequence[KnownImage], machine: dict[str, str]) -> Row:
    """Hurt a deployment that is well, and leave it well."""
    encoders = [replica.address for replica in deployment.encoders]
    decoders = [replica.address for replica in deployment.decoders]
    before = _crashes(deployment)
    with Load(known, encoders, decoders) as load:
        time.sleep(_BEFORE_S)
        start_s = time.monotonic()
        with fault.inject(deployment):
            time.sleep(fault.hold_s)
        end_s = time.monotonic()
        ready_s = _until_normal(deployment, load, end_s)
    outcomes = load.outcomes
    last_s = max((each.end_s for each in outcomes if not each.is_normal), default=0.0)
    return Row(
        fault=fault.name,
        fault_s=end_s - start_s,
        calls=len(outcomes),
        wrong_masks=sum(each.iou is not None and each.iou < RIGHT_IOU for each in outcomes),
        least_iou=min((each.iou for each in outcomes if each.iou is not None), default=None),
        hangs=sum(each.is_late for each in outcomes),
        crashes=_crashes(deployment) - before,
        library_errors=_reasons(outcomes, "library"),
        raw_errors=_reasons(outcomes, "raw"),
        slowest_s=max(each.seconds for each in outcomes),
        normal_s=max(ready_s, last_s - end_s, 0.0),
        **machine,
    )


def _until_normal(deployment: Deployment, load: Load, end_s: float) -> float:
    """Seconds until every replica is ready; returns once the load has settled, or has had every chance to."""
    ready_s = None
    while time.monotonic() < end_s + _NORMAL_LIMIT_S:
        if ready_s is None and all(replica.is_ready() for replica in deployment.all):
            ready_s = time.monotonic() - end_s
        if ready_s is not None and _has_settled(load.outcomes, end_s + ready_s):
            return ready_s
        time.sleep(_POLL_S)
    return _NORMAL_LIMIT_S if ready_s is None else ready_s


def _has_settled(outcomes: Sequence[Outcome], since_s: float) -> bool:
    for by in ("library", "raw"):
        last = [each for each in outcomes if each.by == by and each.end_s - each.seconds > since_s][-_SETTLED:]
        if len(last) < _SETTLED or not all(each.is_normal for each in last):
            return False
    return True


def _crashes(deployment: Deployment) -> int:
    for replica in deployment.all:
        replica.exit_status()
    return sum(replica.crashes for replica in deployment.all)


def _reasons(outcomes: Sequence[Outcome], by: str) -> str:
    counts = Counter(each.reason for each in outcomes if each.by == by and each.reason)
    return "; ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
