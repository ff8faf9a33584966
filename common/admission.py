"""Who may join a queue: the work ahead, in batches as long as those measured, must leave them time and a place."""

import math
import time
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from splitsam.common.errors import DeadlineTooShort, QueueFull, ServiceError, bounded_retry_s
from splitsam.common.fair_queue import FairQueue, Lane, Place
from splitsam.common.service_time import ServiceTime

Item = TypeVar("Item")

# Of the longest wait, what an estimate may reach: batches vary, and who is accepted should be served in time. The share
# falls with everyone who was not and rises with everyone who was, to about one in a hundred; an empty queue resets it.
_LEAST_SHARE, _FIRST_SHARE, _LARGEST_SHARE = 0.3, 0.7, 0.9
_FALL, _RISE = 0.9, 0.0005


class Admission(Generic[Item]):
    """Estimates waits in a queue in front of its workers, and refuses what they leave no room for.

    Args:
        max_weight: work units in a batch. Where it is one, an entry of several takes as many times as long.
        max_queue: entries that may wait.
        max_queue_ms: by lane, the longest wait of an entry; a lane that is not there has no bound.
        workers: that each take a batch.
    """

    def __init__(
        self,
        queue: FairQueue[Item],
        *,
        max_weight: int,
        max_queue: int,
        max_queue_ms: Mapping[Lane, float],
        workers: int = 1,
    ):
        self._queue = queue
        self._max_weight = max_weight
        self._max_queue = max_queue
        self._workers = workers
        self._in_work = 0
        self.longest_s = {lane: max_queue_ms.get(lane, math.inf) / 1000 for lane in Lane}
        self._shares = dict.fromkeys(Lane, _FIRST_SHARE)
        self._times = ServiceTime()
        self._busy_until_s: float | None = None

    def begin_batch(self, weight: int) -> None:
        """A worker has begun a batch, maybe behind others."""
        now_s = time.monotonic()
        self._in_work += 1
        self._busy_until_s = max(now_s, self._busy_until_s or now_s) + self._estimate_s(weight) / self._workers

    def end_batch(self, weight: int, seconds: float) -> None:
        """A worker has ended a batch.

        Args:
            seconds: that it had the worker for itself.
        """
        self._in_work -= 1
        if self._in_work < self._workers:
            self._busy_until_s = None
        alike = self._alike(weight)
        self._times.observe(weight // alike, seconds / alike)
        if not len(self._queue):
            self._shares = dict.fromkeys(Lane, _FIRST_SHARE)

    def find_refusal(self, place: Place[Any], deadline_s: float, ahead: int, later: int) -> ServiceError | None:
        """Why a place is not to be had, or not in time; an idle worker takes anything, and is measured at it.

        Args:
            deadline_s: in seconds of time.monotonic().
            ahead: work units on their way here that are served before this place, besides those that wait.
            later: work units that belong to this place and come after it.
        """
        if len(self._queue) >= self._max_queue and self._queue.is_last(place):
            return QueueFull(f"{self._max_queue} entries are waiting already", retry_delay_s=self.retry_s())
        ahead += self._queue.weight_before(place)
        if not ahead and self._in_work < self._workers:
            return None
        wait_s = self._wait_s(ahead, place.weight)
        if wait_s > self._shares[place.lane] * self.longest_s[place.lane]:
            return QueueFull(f"about {wait_s:.1f} s of work are waiting already", retry_delay_s=self.retry_s())
        own_s = self._estimate_s(place.weight) + later / self._max_weight * self._estimate_s(self._max_weight)
        late_s = time.monotonic() + wait_s + own_s - deadline_s
        if late_s > 0:
            message = f"takes about {own_s:.1f} s after {wait_s:.1f} s in the queue, longer than the deadline leaves"
            return DeadlineTooShort(message, retry_delay_s=bounded_retry_s(late_s))
        return None

    def find_lateness(self, lane: Lane, latest_start_s: float, deadline_s: float) -> ServiceError | None:
        """Why an entry whose turn has come is not served any more."""
        now_s = time.monotonic()
        is_late = now_s > latest_start_s
        share = self._shares[lane]
        self._shares[lane] = max(_LEAST_SHARE, share * _FALL) if is_late else min(_LARGEST_SHARE, share + _RISE)
        if now_s >= deadline_s:
            return DeadlineTooShort("the deadline passed in the queue", retry_delay_s=self.retry_s())
        if is_late:
            return QueueFull("waited longer than anything may", retry_delay_s=self.retry_s())
        return None

    def is_overfull(self) -> bool:
        """Too many entries wait, or the last of them longer than it may."""
        last = self._queue.last()
        if last is None:
            return False
        wait_s = self._wait_s(self._queue.weight - last.weight, last.weight)
        return len(self._queue) > self._max_queue or wait_s > self.longest_s[last.lane]

    def retry_s(self) -> float:
        """About when what waits now will have been served."""
        return bounded_retry_s(self._wait_s(self._queue.weight, self._max_weight))

    def _wait_s(self, ahead: int, weight: int) -> float:
        """From now to the start of an entry's batch: what is left of the running one, and the full ones before it."""
        running_s = max(0.0, (self._busy_until_s or 0.0) - time.monotonic())
        batches = (ahead + min(weight, self._max_weight) - 1) // self._max_weight if ahead else 0
        return running_s + batches * self._estimate_s(self._max_weight) / self._workers

    def _estimate_s(self, weight: int) -> float:
        alike = self._alike(weight)
        return alike * self._times.estimate(weight // alike)

    def _alike(self, weight: int) -> int:
        """Of how many equal parts a batch is thought, since no line leads through batches of one unit."""
        return max(1, weight) if self._max_weight == 1 else 1
