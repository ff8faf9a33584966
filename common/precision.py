"""The precisions a model can be run in, and keeping fp32 what it says."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def exact_convolutions(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """In fp32, keep cuDNN from rounding to TF32, its default, which PyTorch's matrix products do not do."""
    if device.type == "cuda" and dtype == torch.float32:
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return nullcontext()
