"""`python -m splitsam.encoder_service`, also `splitsam serve-encoder`."""

import sys
from collections.abc import Sequence

from splitsam.common.process import run_service
from splitsam.encoder_service.service import EncoderService
from splitsam.encoder_service.settings import EncoderSettings


def main(arguments: Sequence[str] | None = None) -> int:
    return run_service(EncoderSettings, EncoderService, arguments)


if __name__ == "__main__":
    sys.exit(main())
