"""An image encoder as one CUDA graph for each batch size: a batch costs one launch instead of hundreds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

from splitsam.common.shapes import IMAGE_SIDE_PX

# The first call compiles and chooses algorithms, the second shows that nothing is left to do.
WARM_UP_CALLS = 2
# Each batch size compiles both kinds of blocks anew; dynamo's own limit of 8 is there to catch what grows by surprise.
RECOMPILE_LIMIT = 64


class GraphedEncoder(nn.Module):
    """Replays an image encoder on batches filled up to the next of a few sizes; on a CPU it calls the encoder.

    The graphs never run at once, so they share one pool of memory, one buffer of images and one of embeddings. One
    thread at a time may call it, and an answer is good until the next call.

    Args:
        image_encoder: [B, 3, S, S] to [B, 256, S / 16, S / 16], on `device`, without synchronisation in its forward.
        batch_sizes: of the graphs, at least one.
        side_px: S.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        batch_sizes: Sequence[int],
        device: torch.device | str,
        side_px: int = IMAGE_SIDE_PX,
    ):
        super().__init__()
        self.image_encoder = image_encoder
        self.batch_sizes = tuple(sorted(batch_sizes))
        self.device = torch.device(device)
        self._side_px = side_px
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._images: Tensor | None = None
        self._embeddings: Tensor | None = None

    @torch.inference_mode()
    def capture(self) -> None:
        """Compile what there is to compile and capture every batch size, the largest first: its memory serves all."""
        if self.device.type != "cuda":
            return
        with torch.cuda.device(self.device):
            shape = (self.batch_sizes[-1], 3, self._side_px, self._side_px)
            self._images = torch.zeros(shape, dtype=self._dtype(), device=self.device)
            pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            for size in reversed(self.batch_sizes):
                self._graphs[size] = self._capture(self._images[:size], pool, stream)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, S, S] of any floating dtype to [n, 256, S / 16, S / 16].

        Raises:
            ValueError: no image, or more than the largest batch that was captured.
        """
        if len(images) == 0:
            raise ValueError("a batch needs at least one image")
        if self._images is None or self._embeddings is None:
            return self._call(images)
        size = next((size for size in self.batch_sizes if size >= len(images)), None)
        if size is None:
            raise ValueError(f"a batch has at most {self.batch_sizes[-1]} images, not {len(images)}")
        self._images[: len(images)].copy_(
            images, non_blocking=True
        )  # below lie older images, whose answers are cut off
        self._graphs[size].replay()
        return self._embeddings[: len(images)]

    def _capture(self, images: Tensor, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                embeddings = self._call(images)
        torch.cuda.current_stream().wait_stream(stream)
        if self._embeddings is None:
            self._embeddings = torch.empty_like(embeddings, memory_format=torch.contiguous_format)
        del embeddings
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls count: others, such as those that pin memory, go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._embeddings[: len(images)].copy_(self._call(images))
        return graph

    def _call(self, images: Tensor) -> Tensor:
        with dynamo_config.patch(recompile_limit=RECOMPILE_LIMIT):
            embeddings: Tensor = self.image_encoder(images)
        return embeddings

    def _dtype(self) -> torch.dtype:
        return next(self.image_encoder.parameters()).dtype
