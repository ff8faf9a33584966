"""Encodes the images of Label Studio's projects in the background, so that the first click on each is quick."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from splitsam.client.errors import SplitsamError
from splitsam.gateway.errors import GatewayError
from splitsam.gateway.label_config import LabelConfig
from splitsam.gateway.label_tasks import TaskImages
from splitsam.gateway.metrics import GatewayMetrics
from splitsam.gateway.settings import GatewaySettings

log = logging.getLogger("splitsam.gateway.encode_ahead")

_MOST_PROJECTS = 8
Task = Mapping[str, Any]


class EncodeAhead:
    """At most one run for a project at a time, and eight in all; a project beyond them waits for its next set-up.

    A process that ends loses its runs. They begin again with the next set-up, and what is encoded stays so.
    """

    def __init__(self, settings: GatewaySettings, images: TaskImages, metrics: GatewayMetrics):
        self._images = images
        self._most = settings.encode_ahead
        self._in_flight = settings.encode_ahead_in_flight
        self._metrics = metrics
        self._runs: dict[int, asyncio.Task[None]] = {}

    def start(self, project: int, config: LabelConfig) -> bool:
        """Begin with a project's tasks; False where that is not wanted, or not possible now."""
        if not self._most or project in self._runs or len(self._runs) >= _MOST_PROJECTS:
            return False
        run = asyncio.get_running_loop().create_task(self._run(project, config))
        self._runs[project] = run
        run.add_done_callback(lambda _: self._runs.pop(project, None))
        return True

    async def close(self) -> None:
        """End what runs."""
        runs = list(self._runs.values())
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    async def _run(self, project: int, config: LabelConfig) -> None:
        tasks = self._images.tasks(project, self._most)
        turn = asyncio.Lock()
        counts: dict[str, int] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._in_flight):
                    group.create_task(self._work(tasks, turn, config, counts))
        except* (GatewayError, SplitsamError) as failures:
            log.warning("no tasks to encode ahead", extra={"project": project, "problem": str(failures.exceptions[0])})
        except* Exception:
            log.exception("encoding ahead failed", extra={"project": project})
        log.info("encoded ahead", extra={"project": project, **counts})

    async def _work(
        self, tasks: AsyncIterator[Task], turn: asyncio.Lock, config: LabelConfig, counts: dict[str, int]
    ) -> None:
        while True:
            async with turn:
                task = await anext(tasks, None)
            if task is None:
                return
            result = await self._encode(task, config)
            counts[result] = counts.get(result, 0) + 1
            self._metrics.encoded_ahead.labels(result).inc()

    async def _encode(self, task: Task, config: LabelConfig) -> str:
        try:
            return "encoded" if await self._images.encode_ahead(task, config) else "known"
        except (GatewayError, SplitsamError) as error:
            log.info("not encoded ahead", extra={"task": task.get("id"), "problem": str(error)})
            return "failed"
