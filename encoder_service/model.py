"""The image encoder on its device: a batch of prepared images in, an embedding for each out."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from splitsam.common.architectures import IMAGE_SIDE_PX
from splitsam.common.errors import InternalError
from splitsam.common.precision import DTYPES, exact_convolutions
from splitsam.encoder_service.graphs import GraphedEncoder
from splitsam.encoder_service.optimize import build_rungs
from splitsam.encoder_service.preprocess import PreparedImage


class EncoderModel:
    """Runs an image encoder on batches of a few fixed sizes. One thread at a time may call it.

    Args:
        image_encoder: [B, 3, 1024, 1024] to [B, 256, 64, 64]; taken over, moved and changed in place.
        pixel_mean: [3, 1, 1], RGB in 0..255, of the model.
        pixel_std: likewise.
        rungs: of the ladder, see `optimize`; the images are normalised in fp32 whatever they are.
        batch_sizes: a batch is filled up to the next of these with empty images, and split beyond the largest; none
            runs every batch as it comes. Of a compiled encoder on a GPU each becomes a CUDA graph.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        pixel_mean: torch.Tensor,
        pixel_std: torch.Tensor,
        *,
        rungs: Sequence[str] = ("fp32",),
        device: torch.device | str = "cpu",
        batch_sizes: Sequence[int] = (),
    ):
        self.device = torch.device(device)
        self.dtype = DTYPES["bf16" if "bf16" in rungs else "fp32"]
        self.batch_sizes = tuple(sorted(batch_sizes))
        self.image_encoder = build_rungs(image_encoder, rungs, self.device)
        if "compile" in rungs and self.batch_sizes:
            self.image_encoder = GraphedEncoder(self.image_encoder, self.batch_sizes, self.device)
        self._mean = pixel_mean.to(self.device, torch.float32)
        self._std = pixel_std.to(self.device, torch.float32)

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[torch.Tensor | InternalError]:
        """Compute embeddings.

        Returns:
            For each image [256, 64, 64] float32 on the CPU, contiguous (its batch-mates share the storage), or an
            InternalError when it came out with numbers that are not finite; its batch-mates are not concerned.

        Raises:
            ValueError: no image was given.
        """
        if not images:
            raise ValueError("a batch needs at least one image")
        results: list[torch.Tensor | InternalError] = []
        for chunk in self._chunks(images):
            embeddings, finite = self._encode_batch(chunk)
            for embedding, is_finite in zip(embeddings, finite, strict=True):
                results.append(embedding if is_finite else InternalError("the embedding is not finite"))
        return results

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture or run every batch size once, so that no request pays for first-time work."""
        if isinstance(self.image_encoder, GraphedEncoder):
            with exact_convolutions(self.device, self.dtype):
                self.image_encoder.capture()
        for size in self.batch_sizes or (1,):
            self._run(torch.zeros(size, 3, IMAGE_SIDE_PX, IMAGE_SIDE_PX, device=self.device)).cpu()

    def _chunks(self, images: Sequence[PreparedImage]) -> Iterator[Sequence[PreparedImage]]:
        size = self.batch_sizes[-1] if self.batch_sizes else len(images)
        for start in range(0, len(images), size):
            yield images[start : start + size]

    def _encode_batch(self, images: Sequence[PreparedImage]) -> tuple[torch.Tensor, list[bool]]:
        """Returns [n, 256, 64, 64] float32 on the CPU, and for each image whether all its numbers are finite."""
        size = next((size for size in self.batch_sizes if size >= len(images)), len(images))
        embeddings = self._run(self._normalise(images, size))[: len(images)]
        finite = embeddings.isfinite().flatten(1).all(dim=1)
        on_cpu = torch.empty(embeddings.shape, pin_memory=self.device.type == "cuda")
        on_cpu.copy_(embeddings, non_blocking=True)
        # Reading the flags waits for everything before it on the stream, that copy included.
        return on_cpu, finite.tolist()

    def _normalise(self, images: Sequence[PreparedImage], size: int) -> torch.Tensor:
        """[size, 3, 1024, 1024] float32 on the device: normalised, then zeros right of and below, as Sam.preprocess."""
        batch = torch.zeros(size, 3, IMAGE_SIDE_PX, IMAGE_SIDE_PX, device=self.device)
        for row, image in zip(batch, images, strict=False):
            width, height = image.input_size
            pixels = torch.from_numpy(image.pixels)
            if self.device.type == "cuda":
                pixels = pixels.pin_memory()
            pixels = pixels.to(self.device, non_blocking=True).permute(2, 0, 1)
            row[:, :height, :width] = (pixels - self._mean) / self._std
        return batch

    def _run(self, batch: torch.Tensor) -> torch.Tensor:
        """[B, 3, 1024, 1024] to [B, 256, 64, 64], both float32 on the device."""
        with exact_convolutions(self.device, self.dtype):
            embeddings: torch.Tensor = self.image_encoder(batch)
        return embeddings.float()
