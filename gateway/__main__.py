"""`python -m splitsam.gateway`, also `splitsam gateway`."""

import asyncio
import sys
from collections.abc import Sequence

from splitsam.common.server import prepare_process
from splitsam.common.settings import SettingsProblem
from splitsam.common.trace_export import TraceExportProblem, exporting
from splitsam.gateway.service import serve
from splitsam.gateway.settings import GatewaySettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; the exit status is 0 after a drain, 2 for a bad setting or variable."""
    try:
        settings = GatewaySettings.load(sys.argv[1:] if arguments is None else arguments)
        prepare_process(settings)
        with exporting(settings.service_name):
            asyncio.run(serve(settings))
    except (SettingsProblem, TraceExportProblem) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
