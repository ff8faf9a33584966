"""A service as a process: settings, one line for a problem, then serve until told to stop."""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from splitsam.common.errors import CheckpointError, DeviceLost
from splitsam.common.metrics import Metrics
from splitsam.common.server import Service, prepare_process, serve
from splitsam.common.settings import ServiceSettings, SettingsProblem
from splitsam.common.trace_export import TraceExportProblem, exporting

DEVICE_LOST_STATUS = 3
Settings = TypeVar("Settings", bound=ServiceSettings)


def run_service(
    settings_type: type[Settings], build: Callable[[Settings, Metrics], Service], arguments: Sequence[str] | None
) -> int:
    """Run until SIGTERM or SIGINT.

    Returns:
        The exit status: 0 after a drain, 2 for a bad setting or variable, 1 for bad weights. With status 3 the process
        ends here and at once, because its device failed: taking down what has failed may hang.
    """
    try:
        settings = settings_type.load(sys.argv[1:] if arguments is None else arguments)
        prepare_process(settings)
        with exporting(settings.service_name):
            asyncio.run(_serve(settings, build))
    except (SettingsProblem, TraceExportProblem, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CheckpointError) else 2
    except DeviceLost as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        logging.shutdown()
        os._exit(DEVICE_LOST_STATUS)
    return 0


async def _serve(settings: Settings, build: Callable[[Settings, Metrics], Service]) -> None:
    metrics = Metrics()
    await serve(settings, build(settings, metrics), metrics)
