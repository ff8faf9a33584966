"""How the numbers of an embedding are written: fp16, bf16, or int8 with a scale for each channel.

int8 is half of the others:  scale[c] = max |x[c]| / 127,   q = round(x / scale[c])
Written are the scales, float32, then the q. They are read as fp16, and those written again are the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_SCALE_BYTES = 4
_LARGEST = 127


@dataclass(frozen=True)
class Codec:
    """One way to write [C, H, W] numbers, little-endian, in C order.

    Args:
        name: of settings and in messages.
        number: in records.
        dtype: of the numbers when they are read.
        scaled: int8, with a scale for each of C.
    """

    name: str
    number: int
    dtype: torch.dtype
    scaled: bool = False

    def payload_bytes(self, shape: Sequence[int]) -> int:
        """Of numbers of a shape."""
        return _SCALE_BYTES * shape[0] + math.prod(shape) if self.scaled else 2 * math.prod(shape)

    def write(self, values: torch.Tensor) -> bytes | memoryview:
        """Numbers of any float dtype, on the CPU; what is finite stays finite (fp16 ends at 65504).

        What needs no conversion is not copied, but looked at.
        """
        kept = saturate(values.detach(), self.dtype)
        if not self.scaled:
            return kept.contiguous().view(torch.int16).numpy().data.cast("B")
        wide = kept.float().flatten(1)
        scales = wide.abs().amax(dim=1, keepdim=True) / _LARGEST
        rounded = (wide / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
        return scales.numpy().tobytes() + rounded.numpy().tobytes()

    def read(self, payload: bytearray, shape: Sequence[int]) -> torch.Tensor:
        """What `write` has written of numbers of a shape, `payload_bytes` long; the payload is given away."""
        if not self.scaled:
            return torch.frombuffer(payload, dtype=self.dtype).reshape(*shape)
        channels = shape[0]
        scales = torch.frombuffer(payload, dtype=torch.float32, count=channels)
        rounded = torch.frombuffer(payload, dtype=torch.int8, offset=_SCALE_BYTES * channels)
        return saturate(rounded.reshape(channels, -1) * scales[:, None], self.dtype).reshape(*shape)


FP16 = Codec("fp16", 1, torch.float16)
BF16 = Codec("bf16", 2, torch.bfloat16)
INT8 = Codec("int8", 3, torch.float16, scaled=True)
CODECS = {codec.name: codec for codec in (FP16, BF16, INT8)}


def saturate(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In another floating dtype, what is finite staying finite; the tensor itself where it is of that dtype."""
    if values.dtype == dtype:
        return values
    limit = torch.finfo(dtype).max
    # Clamped in float32: bf16 would round fp16's limit up to 65536, and fp16 cannot hold bf16's limit.
    return values.to(torch.float32).clamp(-limit, limit).to(dtype)


def to_fp16(values: torch.Tensor) -> torch.Tensor:
    """In fp16, what is finite saturating at 65504; the tensor itself where it is in fp16."""
    return saturate(values, torch.float16)
