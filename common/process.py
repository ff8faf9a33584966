"""A service as a process: settings, one line for a problem, then serve until told to stop."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from splitsam.common.errors import CheckpointError
from splitsam.common.metrics import Metrics
from splitsam.common.server import Service, prepare_process, serve
from splitsam.common.settings import ServiceSettings, SettingsProblem

Settings = TypeVar("Settings", bound=ServiceSettings)


def run_service(
    settings_type: type[Settings], build: Callable[[Settings, Metrics], Service], arguments: Sequence[str] | None
) -> int:
    """Run until SIGTERM or SIGINT; the exit status: 0 after a drain, 2 for a bad setting, 1 for bad weights."""
    try:
        settings = settings_type.load(sys.argv[1:] if arguments is None else arguments)
        prepare_process(settings)
        asyncio.run(_serve(settings, build))
    except (SettingsProblem, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsProblem) else 1
    return 0


async def _serve(settings: Settings, build: Callable[[Settings, Metrics], Service]) -> None:
    metrics = Metrics()
    await serve(settings, build(settings, metrics), metrics)
