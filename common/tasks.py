"""Several awaitables at once, as one: the first failure is the whole's, and nothing is left running."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results in order; when one fails the others are cancelled, and its own exception is raised."""
    todo = list(coroutines)
    if len(todo) == 1:
        return [await todo[0]]  # most requests have one image with one prompt
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in todo]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
