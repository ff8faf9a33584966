"""`python -m splitsam.decoder_service`, also `splitsam serve-decoder`."""

import sys
from collections.abc import Sequence

from splitsam.common.process import run_service
from splitsam.decoder_service.service import DecoderService
from splitsam.decoder_service.settings import DecoderSettings


def main(arguments: Sequence[str] | None = None) -> int:
    return run_service(DecoderSettings, DecoderService, arguments)


if __name__ == "__main__":
    sys.exit(main())
