"""Tests that need an accelerator: `pytest tests/gpu`; elsewhere each is skipped, and says so."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from splitsam.common.precision import exact_convolutions


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # Another release of torch or Triton may warn of what the pinned ones do not.
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.timeout(600))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """cuDNN rounds the convolutions of the reference to TF32 otherwise."""
    with exact_convolutions(torch.device("cuda"), torch.float32):
        yield
