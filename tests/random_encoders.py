"""Image encoders of `segment_anything` small enough to run in milliseconds, with every weight and table at work."""

from functools import partial

import torch
import torchvision_shim  # noqa: F401
from torch import nn

from splitsam.common.sam_modules import ImageEncoderViT

SIDE_PX = 256  # 16 x 16 tokens: the second window of 14 in each direction is mostly padding
RUNGS_IN_FP32 = ("sdpa", "triton")


def random_encoder(head_dim: int, side_px: int = SIDE_PX, heads: int = 2, window: int = 14) -> ImageEncoderViT:
    """One block with windows and one without, then the neck; built on the CPU."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(head_dim)
        encoder = ImageEncoderViT(
            img_size=side_px,
            embed_dim=heads * head_dim,
            depth=2,
            num_heads=heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window,
            global_attn_indexes=(1,),
        )
        encoder.eval().requires_grad_(False)
        for name, parameter in encoder.named_parameters():
            if "pos" in name or "bias" in name:
                parameter.normal_(std=0.3)
    return encoder


def random_images(count: int, side_px: int = SIDE_PX) -> torch.Tensor:
    return torch.randn(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(count))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square over root mean square."""
    return float((actual.cpu().float() - expected.cpu()).norm() / expected.cpu().norm())
