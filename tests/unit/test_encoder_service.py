"""What becomes of the encoder service when its device fails on the way to a batch."""

import io

import pytest
import torch
from PIL import Image
from redis_process import RedisProcess

from splitsam.common.batcher import Lane
from splitsam.common.device_guard import DeviceGuard
from splitsam.common.errors import NotReady
from splitsam.common.metrics import Metrics
from splitsam.encoder_service.model import EncoderModel
from splitsam.encoder_service.service import EncoderService
from splitsam.encoder_service.settings import EncoderSettings

LOST = "CUDA error: an illegal memory access was encountered"


def raise_lost(*_: object) -> None:
    raise torch.AcceleratorError(LOST)


async def test_a_device_that_refuses_to_pin_an_image_is_found_lost(
    redis_server: RedisProcess, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(EncoderModel, "pin", raise_lost)
    service = EncoderService(EncoderSettings.load(["--device", "cpu", "--redis-url", redis_server.url]), metrics)
    service._guard = DeviceGuard(torch.device("cpu"), metrics, raise_lost)
    await service.open()
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "PNG")
    with pytest.raises(NotReady):
        await service._pipeline.encode("acme", file.getvalue(), Lane.CLICK)
    assert await service.lost() == LOST
    await service.close()
