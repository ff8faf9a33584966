"""Memory of a real GPU that really runs out: batches and jobs are served in parts."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from splitsam.common.architectures import ARCHITECTURES, build_sam
from splitsam.common.device_guard import DeviceGuard
from splitsam.common.errors import DeviceOutOfMemory
from splitsam.common.metrics import Metrics
from splitsam.common.shapes import EMBEDDING_SHAPE
from splitsam.decoder_service.model import DecoderModel
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.prompts import Prompt

GPU = torch.device("cuda", 0)
SIDE = (1024, 1024)
MIB = 2**20


@pytest.fixture
def limit_memory() -> Iterator[None]:
    """Give PyTorch no more than so many MiB on top of what it holds."""

    def limit(more_mib: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(GPU).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + more_mib * MIB) / total, GPU)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    torch.cuda.empty_cache()


def job(prompts: int) -> ImageJob:
    rng = np.random.default_rng(prompts)
    embedding = torch.randn(EMBEDDING_SHAPE, generator=torch.Generator().manual_seed(1)).to(GPU)
    points = [Prompt((rng.random((1, 2)) * 1024).astype(np.float32), np.ones(1, np.int64)) for _ in range(prompts)]
    return ImageJob(embedding, SIDE, SIDE, tuple(points))


def test_job_that_does_not_fit_is_decoded_in_smaller_tiles(limit_memory):
    model = DecoderModel(build_sam(ARCHITECTURES["vit_t"]), GPU, max_prompts_per_forward=256)
    asked = job(256)
    [expected] = model.decode([asked])
    expected_logits = torch.stack([answer.logits.cpu() for answer in expected])
    del expected
    limit_memory(1500)  # 256 prompts in one pass take several GiB
    [answers] = model.decode([asked])
    torch.testing.assert_close(
        torch.stack([answer.logits.cpu() for answer in answers]), expected_logits, atol=1e-3, rtol=0
    )


def test_device_that_ran_out_of_memory_is_not_lost_and_serves_again(limit_memory):
    guard = DeviceGuard(GPU, Metrics())
    limit_memory(64)

    def allocate(sizes_mib: list[int]) -> list[int]:
        return [torch.zeros(size * MIB, dtype=torch.uint8, device=GPU).numel() for size in sizes_mib]

    with pytest.raises(DeviceOutOfMemory):
        guard.guarded(allocate)([4096])
    assert not guard.is_lost
    assert guard.guarded(allocate)([1]) == [MIB]
