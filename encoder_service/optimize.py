"""The ladder: `segment_anything`'s image encoder, one optimisation after another, each a rung of its own.

    fp32     the encoder as it is
    bf16     weights and activations in bfloat16; nothing in the forward waits for the GPU
    compile  torch.compile block by block: two kinds of blocks are compiled, not 12, 24 or 32
    sdpa     scaled_dot_product_attention, position terms as a dense mask
    triton   this project's attention kernels, position terms made inside
    fused    the GELU of each MLP inside the product before it, in the tanh form
    int8     torchao's dynamic int8 on every linear layer of the blocks
    sparse   2:4 magnitude pruning of those layers

Beside the ladder stand

    sparse_mlp   in the place of sparse: 2:4 pruning of the MLPs alone
    fp8          in the place of int8 and all after it: 8-bit floats in those layers, made in the kernel before each

A rung changes the encoder in place and stands on any of those before it. `GraphedEncoder` makes CUDA graphs of the
result. On a CPU, triton, fused, sparse and fp8 compute the same numbers without their speed.
Source: https://pytorch.org/blog/accelerating-generative-ai/
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from splitsam.common.sam_modules import ImageEncoderViT
from splitsam.encoder_service.attention import PatchProduct, ProductAttention, RelPosAttention, SdpaAttention
from splitsam.encoder_service.fused import FusedMlp
from splitsam.encoder_service.sparsity import sparsify_

RUNGS: tuple[str, ...] = ("fp32", "bf16", "compile", "sdpa", "triton", "fused", "int8", "sparse")
SPARSE_MLP = "sparse_mlp"
FP8 = "fp8"
# The rungs beside the ladder, and which each stands in the place of, with all after it.
BESIDE = {SPARSE_MLP: "sparse", FP8: "int8"}
LEAST_CAPABILITY = (8, 0)
_CAPABILITIES = {FP8: (8, 9)}  # where it is another


def apply_rung(name: str, image_encoder: nn.Module) -> nn.Module:
    """Apply one rung to an encoder that has those it needs; the encoder is changed in place and returned.

    Args:
        name: one of RUNGS or BESIDE.
        image_encoder: `segment_anything`'s, with its weights loaded, on its device.

    Raises:
        ValueError: there is no such rung, or it cannot be applied to this encoder.
    """
    if name not in _APPLY:
        raise ValueError(f"no rung is called {name!r}: there are {', '.join(_APPLY)}")
    _APPLY[name](image_encoder)
    return image_encoder


def build_rungs(image_encoder: nn.Module, rungs: Sequence[str], device: torch.device) -> nn.Module:
    """Move an encoder to a device and apply rungs, in the order of the ladder whatever order they are named in.

    Returns:
        The encoder, changed in place: [B, 3, 1024, 1024] float32 to [B, 256, 64, 64] in its own precision.

    Raises:
        ValueError: as `apply_rung`, or the device is a GPU and cannot do it.
    """
    unknown = [rung for rung in rungs if rung not in _APPLY]
    if unknown:
        raise ValueError(f"no rung is called {unknown[0]!r}: there are {', '.join(_APPLY)}")
    chosen = [rung for rung in _APPLY if rung in rungs]
    for rung in chosen:
        reason = unsupported(rung, device) if device.type == "cuda" else None
        if reason is not None:
            raise ValueError(f"the rung {rung} is not for this device: {reason}")
    image_encoder.to(device).eval().requires_grad_(False)
    for rung in chosen:
        apply_rung(rung, image_encoder)
    return image_encoder


def unsupported(rung: str, device: torch.device) -> str | None:
    """Why a rung gains nothing on this device, or cannot run there; None when it can."""
    if rung in ("compile", "triton", FP8) and not _has_compiler():
        return "there is no C++ compiler, which torch.compile and Triton need"
    if device.type != "cuda":
        return _NEEDS_GPU.get(rung)
    capability = torch.cuda.get_device_capability(device)
    least = _CAPABILITIES.get(rung, LEAST_CAPABILITY)
    if rung not in _ANY_GPU and capability < least:
        return f"it needs compute capability {_dotted(least)}, the GPU has {_dotted(capability)}"
    if rung in _SPARSE and not torch.backends.cusparselt.is_available():
        return "this build of PyTorch has no cuSPARSELt"
    return None


_SPARSE = ("sparse", SPARSE_MLP)
_ANY_GPU = ("fp32", "sdpa")
_NEEDS_GPU = dict.fromkeys(_SPARSE, "2:4 arithmetic needs a CUDA GPU") | {
    "triton": "the kernels need a CUDA GPU",
    "fused": "a GELU inside a product needs a CUDA GPU",
    FP8: "8-bit floats need a CUDA GPU",
}


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def _keep(image_encoder: nn.Module) -> None:
    """fp32 is the encoder as it is."""


def _round(image_encoder: nn.Module) -> None:
    image_encoder.to(torch.bfloat16)
    _work_out_shapes(image_encoder)


def _compile(image_encoder: nn.Module) -> None:
    """Takes effect with the first call, so that later rungs may still change what a block is made of."""
    encoder = _work_out_shapes(image_encoder)
    for part in (encoder.patch_embed, *encoder.blocks, encoder.neck):
        part.compile(fullgraph=True, dynamic=False)


def _use_sdpa(image_encoder: nn.Module) -> None:
    for block in _work_out_shapes(image_encoder).blocks:
        block.attn = SdpaAttention(block.attn)


def _use_kernels(image_encoder: nn.Module) -> None:
    from splitsam.encoder_service.kernel_attention import KernelAttention

    for block in _work_out_shapes(image_encoder).blocks:
        block.attn = KernelAttention(block.attn, windowed=block.window_size > 0)
        block.window_size = 0  # the block neither cuts nor pads any more


def _fuse(image_encoder: nn.Module) -> None:
    for block in _work_out_shapes(image_encoder).blocks:
        block.mlp = FusedMlp(block.mlp)


def _quantise(image_encoder: nn.Module) -> None:
    # Imported here: it takes seconds, and the exact precisions do without.
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    # Its own settings of the compiler would tune kernels for minutes.
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(_work_out_shapes(image_encoder).blocks, config)


def _use_float8(image_encoder: nn.Module) -> None:
    from splitsam.encoder_service.float8 import use_float8_
    from splitsam.encoder_service.kernel_attention import KernelAttention

    encoder = _work_out_shapes(image_encoder)
    if not isinstance(encoder.blocks[0].attn, KernelAttention):
        _use_kernels(encoder)  # its blocks take whole grids
    use_float8_(encoder)


def _work_out_shapes(image_encoder: nn.Module) -> Any:
    """Put modules with everything that depends on shapes alone worked out in the place of `segment_anything`'s.

    Raises:
        ValueError: this is no image encoder of `segment_anything`, or one without relative positions.
    """
    if not isinstance(image_encoder, ImageEncoderViT):
        raise ValueError(f"the rungs change segment_anything's ImageEncoderViT, not {type(image_encoder).__name__}")
    encoder: Any = image_encoder
    if not isinstance(encoder.patch_embed, PatchProduct):
        encoder.patch_embed = PatchProduct(encoder.patch_embed)
    for block in encoder.blocks:
        if not isinstance(block.attn, RelPosAttention):
            block.attn = ProductAttention(block.attn)
    return encoder


# In the order of the ladder, those beside it last.
_APPLY: dict[str, Callable[[nn.Module], None]] = {
    "fp32": _keep,
    "bf16": _round,
    "compile": _compile,
    "sdpa": _use_sdpa,
    "triton": _use_kernels,
    "fused": _fuse,
    "int8": _quantise,
    "sparse": sparsify_,
    SPARSE_MLP: lambda image_encoder: sparsify_(image_encoder, "mlp"),
    FP8: _use_float8,
}
