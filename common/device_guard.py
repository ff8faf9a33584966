"""What a device does to the process: memory that runs out is survived, a lost device ends the process.

out of memory   a batch is halved until its parts fit; a part of one that does not fit is answered with a wait
lost            whatever was raised, the device answers nothing any more (CUDA keeps such errors until the process
                ends): calls are turned away, health says so, and the process exits for its successor to start
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

import torch

from splitsam.common.errors import DeviceOutOfMemory, NotReady, ServiceError
from splitsam.common.metrics import Metrics

log = logging.getLogger("splitsam.device")

# Items in a row that did not fit alone, until the process gives way to one with its memory in order.
OUT_OF_MEMORY_LIMIT = 5
Item = TypeVar("Item")
Result = TypeVar("Result")
Model = Callable[[Sequence[Item]], Sequence[Result]]
ModelOnLoop = Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]


class DeviceGuard:
    """Judges what is raised while a device is used, on any thread.

    Args:
        probe: raises when the device is lost; by default asks a CUDA device to finish its work.
    """

    def __init__(self, device: torch.device, metrics: Metrics, probe: Callable[[], None] | None = None):
        self._device = device
        self._metrics = metrics
        self._probe = probe or self._synchronise
        self._lost: Future[str] = Future()
        self._wreck: list[Exception] = []
        if device.type == "cuda":
            metrics.device_memory_bytes.set_function(lambda: torch.cuda.memory_reserved(device))
        self._out_of_memory_in_a_row = 0

    @property
    def is_lost(self) -> bool:
        return self._lost.done()

    async def lost(self) -> str:
        """Wait until the device is lost; why."""
        return await asyncio.shield(asyncio.wrap_future(self._lost))

    def guarded(self, run: Model[Item, Result]) -> Model[Item, Result]:
        """A model call that raises as `watch` says."""

        def call(items: Sequence[Item]) -> Sequence[Result]:
            with self._watch_batch(items):
                return run(items)

        return call

    def guarded_on_loop(self, run: ModelOnLoop[Item, Result]) -> ModelOnLoop[Item, Result]:
        """As `guarded`, of a model call that is awaited."""

        async def call(items: Sequence[Item]) -> Sequence[Result]:
            with self._watch_batch(items):
                return await run(items)

        return call

    @contextlib.contextmanager
    def _watch_batch(self, items: Sequence[Item]) -> Iterator[None]:
        with self.watch(len(items)):
            yield
        self._out_of_memory_in_a_row = 0

    @contextlib.contextmanager
    def watch(self, items: int = 1) -> Iterator[None]:
        """Around any use of the device.

        Args:
            items: that share the work; when it does not fit they are to be tried in smaller parts.

        Raises:
            DeviceOutOfMemory: it does not fit.
            NotReady: the device is lost, now or since before.
        """
        if self.is_lost:
            raise _going_away()
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._metrics.device_errors.labels("out_of_memory").inc()
            log.warning("the device is out of memory", extra={"batch": items, "error": _first_line(error)})
            if items == 1:
                self._count_out_of_memory()
            raise DeviceOutOfMemory("the device is out of memory", retry_delay_s=1.0) from None
        except ServiceError:
            raise  # an answer, which says nothing of the device
        except Exception as error:
            if self._answers():
                raise
            # Its traceback holds what was in work. PyTorch frees pinned memory, and what several streams used, with a
            # CUDA call, and the process aborts where that fails: https://github.com/pytorch/pytorch/pull/178154.
            self._wreck.append(error)
            self._lose(_first_line(error))
            raise _going_away() from error

    def _count_out_of_memory(self) -> None:
        self._out_of_memory_in_a_row += 1
        if self._out_of_memory_in_a_row >= OUT_OF_MEMORY_LIMIT:
            self._lose(f"{OUT_OF_MEMORY_LIMIT} items in a row did not fit alone")

    def _answers(self) -> bool:
        try:
            self._probe()
        except RuntimeError:  # torch's errors of a device all are
            return False
        return True

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _lose(self, reason: str) -> None:
        with contextlib.suppress(InvalidStateError):  # another thread was first
            self._lost.set_result(reason)
            self._metrics.device_errors.labels("lost").inc()
            log.error("the device is lost", extra={"reason": reason})


def _going_away() -> NotReady:
    return NotReady("the device of this replica failed; it is being replaced", retry_delay_s=1.0)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
