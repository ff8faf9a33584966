"""The image encoder on its device: a batch of prepared images in, an embedding for each out."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitsam.common.codecs import saturate
from splitsam.common.errors import CheckpointError, InternalError
from splitsam.common.precision import DTYPES, exact_convolutions
from splitsam.common.shapes import IMAGE_SIDE_PX
from splitsam.common.transfers import Download, Steps, finish, finish_on_loop, upload
from splitsam.encoder_service.graphs import GraphedEncoder
from splitsam.encoder_service.optimize import build_rungs
from splitsam.encoder_service.preprocess import PreparedImage

# A batch is filled up to the next of the fixed sizes if that much of it is images; else it is split into smaller ones.
_FULL_ENOUGH = 0.75


@dataclass(frozen=True, eq=False)
class DeviceImage:
    """A PreparedImage whose pixels, [h, w, 3] uint8, are on the device, complete."""

    pixels: Tensor
    image_size: tuple[int, int]
    input_size: tuple[int, int]
    orientation: int


EncoderImage = PreparedImage | DeviceImage


class EncoderModel:
    """Runs an image encoder on batches of a few fixed sizes. One thread at a time may call it.

    Args:
        image_encoder: [B, 3, 1024, 1024] to [B, 256, 64, 64]; taken over, moved and changed in place.
        pixel_mean: [3, 1, 1], RGB in 0..255, of the model.
        pixel_std: likewise.
        rungs: of the ladder, see `optimize`; the images are normalised in fp32 whatever they are.
        batch_sizes: a batch is cut into these, the last filled up with empty images; none runs every batch as it comes.
            Of a compiled encoder on a GPU each becomes a CUDA graph.
        embedding_dtype: in which embeddings leave the device.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        pixel_mean: Tensor,
        pixel_std: Tensor,
        *,
        rungs: Sequence[str] = ("fp32",),
        device: torch.device | str = "cpu",
        batch_sizes: Sequence[int] = (),
        embedding_dtype: torch.dtype = torch.float32,
    ):
        self.device = torch.device(device)
        self.dtype = DTYPES["bf16" if "bf16" in rungs else "fp32"]
        self.batch_sizes = tuple(sorted(batch_sizes))
        self.image_encoder = build_rungs(image_encoder, rungs, self.device)
        if "compile" in rungs and self.batch_sizes:
            self.image_encoder = GraphedEncoder(self.image_encoder, self.batch_sizes, self.device)
        self._embedding_dtype = embedding_dtype
        self._mean = pixel_mean.to(self.device, torch.float32)
        self._std = pixel_std.to(self.device, torch.float32)
        self._places = torch.arange(IMAGE_SIDE_PX, device=self.device)
        on_gpu = self.device.type == "cuda"
        # Copies have streams of their own: they go on while the device computes on another batch.
        new_stream: Any = torch.cuda.Stream  # torch's own lack types
        self._bringing, self._sending = (new_stream(self.device) if on_gpu else None for _ in range(2))

    @property
    def is_graphed(self) -> bool:
        """A batch is a few launches that wait for nothing; else it is hundreds, some of which wait for the device."""
        return self.device.type == "cuda" and isinstance(self.image_encoder, GraphedEncoder)

    def pin(self, image: PreparedImage) -> PreparedImage:
        """The image in memory that a GPU copies from by itself; on a CPU the image as it is. For any thread."""
        if self.device.type != "cuda":
            return image
        return dataclasses.replace(image, pixels=torch.from_numpy(image.pixels).pin_memory().numpy())

    def encode(self, images: Sequence[EncoderImage]) -> list[Tensor | InternalError]:
        """Compute embeddings.

        Returns:
            For each image [256, 64, 64] of `embedding_dtype` on the CPU, contiguous (its batch-mates share the
            storage), what is finite saturating; or an InternalError when it came out with numbers that are not finite,
            which concerns no batch-mate.

        Raises:
            ValueError: no image was given.
        """
        return finish(self._answer(images), self.device)

    async def encode_on_loop(self, images: Sequence[EncoderImage]) -> list[Tensor | InternalError]:
        """As `encode`, on the thread of an event loop, where it `is_graphed`: the next batch can be begun meanwhile."""
        return await finish_on_loop(self._answer(images), self.device)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture or run every batch size once, so that no request pays for first-time work.

        Raises:
            CheckpointError: what comes out is not finite.
        """
        if isinstance(self.image_encoder, GraphedEncoder):
            with exact_convolutions(self.device, self.dtype):
                self.image_encoder.capture()
        size = (IMAGE_SIDE_PX, IMAGE_SIDE_PX)
        blank = PreparedImage(np.zeros((*size, 3), np.uint8), size, size, 0)
        for count in self.batch_sizes or (1,):
            # Two are under way at a time: memory that is pinned for the second must not wait for the first then.
            batches = [self._answer([blank] * count) for _ in range(2 if self.is_graphed else 1)]
            for batch in batches:
                next(batch)
            for batch in batches:
                if any(isinstance(result, InternalError) for result in finish(batch, self.device)):
                    raise CheckpointError(f"the embedding of an empty image is not finite, in batches of {count}")

    @torch.inference_mode()
    def _answer(self, images: Sequence[EncoderImage]) -> Steps[list[Tensor | InternalError]]:
        if not images:
            raise ValueError("a batch needs at least one image")
        results: list[Tensor | InternalError] = []
        for download in [self._launch(chunk, size) for chunk, size in self._chunks(images)]:
            yield download
            embeddings, finite = download.tensors()
            for embedding, is_finite in zip(embeddings, finite.tolist(), strict=True):
                results.append(embedding if is_finite else InternalError("the embedding is not finite"))
        return results

    def _chunks(self, images: Sequence[EncoderImage]) -> Iterator[tuple[Sequence[EncoderImage], int]]:
        """Images that go through the encoder together, and the size of their batch."""
        start = 0
        while start < len(images):
            left = len(images) - start
            size = next((size for size in self.batch_sizes if _FULL_ENOUGH * size <= left <= size), None)
            if size is None:
                size = max((size for size in self.batch_sizes if size <= left), default=left)
            if self.batch_sizes:
                size = max(size, self.batch_sizes[0])
            yield images[start : start + size], size
            start += size

    def _launch(self, images: Sequence[EncoderImage], size: int) -> Download:
        """[n, 256, 64, 64] on its way to the host, and for each image whether all its numbers are finite."""
        embeddings = self._run(self._normalise(*self._bring(images, size)))[: len(images)]
        finite = embeddings.isfinite().flatten(1).all(dim=1)
        return self._send(saturate(embeddings, self._embedding_dtype), finite)

    def _bring(self, images: Sequence[EncoderImage], size: int) -> tuple[Tensor, Tensor]:
        """Pixels [size, 1024, 1024, 3] uint8 and [size, 2] int64, the height and width of the images in them."""
        if self._bringing is None:
            return self._copy(images, size)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._bringing):
            pixels, sizes = self._copy(images, size)
        current.wait_stream(self._bringing)
        pixels.record_stream(current)
        sizes.record_stream(current)
        return pixels, sizes

    def _copy(self, images: Sequence[EncoderImage], size: int) -> tuple[Tensor, Tensor]:
        pixels = torch.empty(size, IMAGE_SIDE_PX, IMAGE_SIDE_PX, 3, dtype=torch.uint8, device=self.device)
        sizes = np.zeros((size, 2), np.int64)
        for number, image in enumerate(images):
            width, height = sizes[number, ::-1] = image.input_size
            source = image.pixels if isinstance(image, DeviceImage) else torch.from_numpy(image.pixels)
            pixels[number, :height, :width].copy_(source, non_blocking=True)
            if source.is_cuda:
                source.record_stream(torch.cuda.current_stream(self.device))
        return pixels, upload(sizes, self.device)

    def _send(self, embeddings: Tensor, finite: Tensor) -> Download:
        if self._sending is None:
            return Download(embeddings, finite)
        self._sending.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._sending):
            download = Download(embeddings, finite)
        embeddings.record_stream(self._sending)
        finite.record_stream(self._sending)
        return download

    def _normalise(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """[B, 3, 1024, 1024] float32: normalised, then zeros right of and below the images, as Sam.preprocess."""
        batch = torch.empty(len(pixels), 3, IMAGE_SIDE_PX, IMAGE_SIDE_PX, device=self.device)
        batch.copy_(pixels.permute(0, 3, 1, 2)).sub_(self._mean).div_(self._std)
        inside = self._places < sizes[:, :, None]
        return batch.masked_fill_(~(inside[:, 0, :, None] & inside[:, 1, None])[:, None], 0.0)

    def _run(self, batch: Tensor) -> Tensor:
        """[B, 3, 1024, 1024] to [B, 256, 64, 64], both float32 on the device."""
        with exact_convolutions(self.device, self.dtype):
            embeddings: Tensor = self.image_encoder(batch)
        return embeddings.float()
