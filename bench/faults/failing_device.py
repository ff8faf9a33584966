"""A service whose device fails when a file says so: `python -m bench.faults.failing_device encoder --port ...`.

There need be no GPU: the model raises torch's own exceptions, and everything above it is the service's. The file is
named after the port, in the folder SPLITSAM_FAULT_FOLDER, and holds one line:

    out-of-memory 3     the next three calls of the model raise torch.OutOfMemoryError
    lost                every call raises torch.AcceleratorError from now on, as after an illegal memory access
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from splitsam.common.device_guard import DeviceGuard
from splitsam.common.metrics import Metrics
from splitsam.common.process import run_service
from splitsam.decoder_service.service import DecoderService
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.encoder_service.service import EncoderService
from splitsam.encoder_service.settings import EncoderSettings

FAULT_FOLDER = "SPLITSAM_FAULT_FOLDER"


class FailingDevice:
    """What the file says, as exceptions."""

    def __init__(self, path: Path):
        self._path = path
        self._is_lost = False

    def probe(self) -> None:
        """As torch.cuda.synchronize: raises when the device is lost."""
        if self._is_lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\n")

    def call(self) -> None:
        """Before each call of the model."""
        order, _, number = self._path.read_text().strip().partition(" ") if self._path.exists() else ("", "", "")
        if order == "lost":
            self._is_lost = True
        if order == "out-of-memory" and int(number):
            self._path.write_text(f"out-of-memory {int(number) - 1}")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 25.00 MiB.")
        self.probe()

    def before(self, model: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], Any]:
        """The model with its failures; what is awaited fails when it is called."""

        def call(items: Sequence[Any]) -> Any:
            self.call()
            return model(items)

        return call


class FailingEncoder(EncoderService):
    def __init__(self, settings: EncoderSettings, metrics: Metrics):
        super().__init__(settings, metrics)
        self._failing = FailingDevice(Path(os.environ[FAULT_FOLDER]) / str(settings.port))
        self._guard = DeviceGuard(self._device, metrics, self._failing.probe)

    def _load(self) -> Any:
        model, info = super()._load()
        model.encode = self._failing.before(model.encode)  # type: ignore[method-assign]
        model.encode_on_loop = self._failing.before(model.encode_on_loop)  # type: ignore[method-assign]
        return model, info


class FailingDecoder(DecoderService):
    def __init__(self, settings: DecoderSettings, metrics: Metrics):
        super().__init__(settings, metrics)
        self._failing = FailingDevice(Path(os.environ[FAULT_FOLDER]) / str(settings.port))
        self._guard = DeviceGuard(self._device, metrics, self._failing.probe)

    def _load(self) -> Any:
        model, info = super()._load()
        model.decode = self._failing.before(model.decode)  # type: ignore[method-assign]
        model.decode_on_loop = self._failing.before(model.decode_on_loop)  # type: ignore[method-assign]
        return model, info


if __name__ == "__main__":
    service, *arguments = sys.argv[1:]
    if service == "encoder":
        sys.exit(run_service(EncoderSettings, FailingEncoder, arguments))
    sys.exit(run_service(DecoderSettings, FailingDecoder, arguments))
