"""Images with mask inputs, as of clicks that refine, by one CUDA graph: two copies and one launch.

Launch by launch they are some thirty operations, and at a few clicks at once these took the host longer than all else
that it does for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitsam.common.shapes import LOW_RES_SIDE_PX
from splitsam.common.transfers import pinned
from splitsam.decoder_service.network import Network
from splitsam.decoder_service.prepared import CHANNELS, PIXELS, PreparedEmbedding

# Powers of two; what is between is filled up with what was there before.
CAPTURED_COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, eq=False)
class _Graph:
    """One count of sources. Without a `graph`, on a CPU, what it does is done each time."""

    rows: Tensor
    graph: Any  # torch's own lack types


class MaskedGraphs:
    """`Network.prepare_masked` for up to 16 sources. One thread at a time may call it, on one stream.

    Args:
        counts: of sources, each with a graph of its own.
    """

    def __init__(self, network: Network, counts: tuple[int, ...] = CAPTURED_COUNTS):
        self._network, self._counts = network, counts
        largest, side, device = counts[-1], LOW_RES_SIDE_PX, network.device
        self._pixels = torch.zeros(largest, PIXELS, CHANNELS, dtype=network.dtype, device=device)
        self._mask_inputs = torch.zeros(largest, 1, side, side, dtype=torch.float16, device=device)
        self._graphs: dict[int, _Graph] = {}

    def capture(self) -> None:
        """Capture a graph for each count, the largest first: its memory serves all."""
        on_gpu = self._network.device.type == "cuda"
        pool = torch.cuda.graph_pool_handle() if on_gpu else None
        for count in reversed(self._counts):
            rows, graph = self._prepare(count), None
            if pool is not None:
                torch.cuda.synchronize(self._network.device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    rows = self._prepare(count)
            self._graphs[count] = _Graph(rows, graph)

    def take(self, mask_inputs: npt.NDArray[np.floating[Any]]) -> bool:
        """Whether these were captured: as many or fewer, [M, 1, 256, 256], in float16 as the service keeps logits."""
        return bool(self._graphs) and len(mask_inputs) <= self._counts[-1] and mask_inputs.dtype == np.float16

    def prepare(
        self, images: Sequence[PreparedEmbedding], mask_inputs: npt.NDArray[np.floating[Any]]
    ) -> list[PreparedEmbedding]:
        """M images with mask inputs that `take` admits.

        Returns:
            Sources that the next call overwrites: good for all work that is launched before it.
        """
        masked = len(images)
        captured = self._graphs[next(count for count in self._counts if count >= masked)]
        self._mask_inputs[:masked].copy_(pinned(mask_inputs, self._network.device), non_blocking=True)
        torch.stack([image.pixels for image in images], out=self._pixels[:masked])
        rows = captured.rows
        if captured.graph is not None:
            captured.graph.replay()
        else:
            rows = self._prepare(len(rows))
        return [PreparedEmbedding(of_one) for of_one in rows[:masked]]

    def _prepare(self, count: int) -> Tensor:
        return self._network.masked_rows(self._pixels[:count], self._mask_inputs[:count])
