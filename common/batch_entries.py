"""What waits in a batcher, and how it is answered: each entry once, whatever happens to its batch."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from opentelemetry.trace import Span

from splitsam.common.errors import InternalError
from splitsam.common.fair_queue import Place

log = logging.getLogger("splitsam.batcher")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Served(Generic[Result]):
    """A result and where its time went.

    Args:
        queue_ms: from submission to the start of its batch.
        model_ms: the batch it was in.
    """

    value: Result
    queue_ms: float
    model_ms: float


@dataclass(frozen=True)
class Entry(Generic[Item, Result]):
    """An item and who waits for it; times are seconds of time.monotonic().

    Args:
        latest_start_s: when its batch has to begin at the latest.
        deadline_s: when its caller gives up.
        request: the caller's span; `waiting` is that of the wait for a batch.
    """

    item: Item
    queued_at_s: float
    latest_start_s: float
    deadline_s: float
    future: "asyncio.Future[Served[Result]]"
    request: Span
    waiting: Span


def answer(
    entries: Sequence[Entry[Item, Result]], results: Sequence[Result | Exception], start_s: float, end_s: float
) -> None:
    """Hand over the results of a batch that ran from start_s to end_s, to those who still wait for them."""
    for entry, result in zip(entries, results, strict=True):
        if entry.future.done():
            continue
        if isinstance(result, Exception):
            entry.future.set_exception(result)
        else:
            entry.future.set_result(Served(result, (start_s - entry.queued_at_s) * 1000, (end_s - start_s) * 1000))


@contextlib.contextmanager
def answering(batch: Sequence[Place[Entry[Any, Any]]], batcher: str) -> Iterator[None]:
    """Whatever is raised inside, nobody in the batch is left without an answer, and the batcher goes on."""
    try:
        yield
    except (Exception, asyncio.CancelledError):  # a model on the event loop may await what others cancel
        log.exception("a batch failed outside the model", extra={"batcher": batcher, "batch": len(batch)})
        for place in batch:
            if not place.item.future.done():
                place.item.future.set_exception(InternalError("the batch that the request was in failed"))
