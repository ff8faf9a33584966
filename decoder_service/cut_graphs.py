"""Few masks, as of a click, cut by one CUDA graph: a copy of their numbers, one launch and a copy back.

Launch by launch that is five kernels and some twenty operations, and takes the host longer than the device. A graph's
grids are fixed: they cover the largest mask that it takes, and programs beyond a mask's own size end at once.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitsam.common.transfers import Download

# Powers of two; a plan is filled up with masks without pixels.
CAPTURED_COUNTS = (1, 2, 4, 8, 16)
LARGEST = (4096, 4096)  # height and width; the bits of 16 such masks are 32 MiB
# Of a mask as a rule: 16 KiB of text.
BOUNDARIES_OF_A_MASK = 8192
# A run takes one or two characters as a rule.
CHARACTERS_PER_RUN = 2
_WORD = 32
_MEASURES, _SPAN = 8, 2
Heights = TypeVar("Heights", int, npt.NDArray[np.int64])


def words_of(height: Heights) -> Heights:
    """Words of 32 bits that a column of so many pixels takes."""
    return -(-height // _WORD)


@dataclass(frozen=True, eq=False)
class GraphAnswer:
    """What a graph has begun to cut.

    Args:
        download: of one array of bytes: [count, 8 + 2] int32, measures and spans, then the text of all masks.
        count: of masks, fillers included.
    """

    download: Download
    count: int

    def read(self, masks: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], bytes] | None:
        """Measures [masks, 8], spans [masks, 2] and text of the first masks, as the kernels leave them.

        None where their runs had too little room.
        """
        [answer] = self.download.wait()
        split = 4 * self.count * (_MEASURES + _SPAN)
        numbers = answer[:split].view(np.int32).reshape(self.count, -1)
        measures, spans = numbers[:masks, :_MEASURES], numbers[:masks, _MEASURES:]
        used_bytes = int(spans.sum(1).max())
        boundaries = int(measures[:, 7].astype(np.int64).sum())
        if boundaries > BOUNDARIES_OF_A_MASK * self.count or used_bytes > len(answer) - split:
            return None
        return measures, spans, answer[split : split + used_bytes].tobytes()


@dataclass(frozen=True, eq=False)
class _Graph:
    """One count of masks. Without a `graph`, on a CPU, what it does is done each time."""

    plan: Tensor
    answer: Tensor
    graph: Any  # torch's own lack types


class CutGraphs:
    """Cuts up to 16 masks on one device. One thread at a time may call it, on one stream.

    Args:
        largest: height and width that no mask may exceed.
        counts: of masks, each with a graph of its own.
    """

    def __init__(
        self, device: torch.device, largest: tuple[int, int] = LARGEST, counts: tuple[int, ...] = CAPTURED_COUNTS
    ):
        self._device, self._largest, self._counts = device, largest, counts
        self.bits = torch.empty(counts[-1] * words_of(largest[0]) * largest[1], dtype=torch.int32, device=device)
        self._graphs: dict[int, _Graph] = {}

    def capture(self) -> None:
        """Capture a graph for each count, the largest first: its memory serves all."""
        from splitsam.kernels.cut_masks import PLAN_COLUMNS  # Triton is on Linux alone

        pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        for count in reversed(self._counts):
            plan = torch.zeros(count, PLAN_COLUMNS, dtype=torch.int64, device=self._device)
            answer, graph = self._cut(plan), None
            if pool is not None:
                torch.cuda.synchronize(self._device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    answer = self._cut(plan)
            self._graphs[count] = _Graph(plan, answer, graph)

    def take(self, sizes: npt.NDArray[np.int64]) -> bool:
        """Whether masks of these heights and widths [M, 2] may be cut here."""
        return 0 < len(sizes) <= self._counts[-1] and bool((sizes <= self._largest).all())

    def begin(self, plan: npt.NDArray[np.int64]) -> GraphAnswer:
        """Have masks cut that `take` admits.

        Args:
            plan: [M, 9] of `cut_masks`, with room in `bits`.
        """
        count = next(count for count in self._counts if count >= len(plan))
        captured = self._graphs[count]
        filled = torch.zeros(captured.plan.shape, dtype=torch.int64, pin_memory=captured.graph is not None)
        filled.numpy()[: len(plan)] = plan
        captured.plan.copy_(filled, non_blocking=True)
        answer = captured.answer
        if captured.graph is not None:
            captured.graph.replay()
        else:
            answer = self._cut(captured.plan)
        # On its way to the host before anything else is done on this stream, the next masks included.
        return GraphAnswer(Download(answer), count)

    def _cut(self, plan: Tensor) -> Tensor:
        """What `GraphAnswer` downloads, of a plan on the device."""
        from splitsam.kernels.cut_masks import cut_masks
        from splitsam.kernels.encode_runs import encode_runs
        from splitsam.kernels.run_boundaries import count_boundaries, place_boundaries

        room = BOUNDARIES_OF_A_MASK * len(plan)
        measures = cut_masks(plan, self._largest)
        ends = count_boundaries(plan, measures, self._largest, len(plan) * self._largest[1])
        boundaries = place_boundaries(plan, ends, self._largest, 0, room)
        runs = encode_runs(plan, measures, ends, boundaries, 0)
        numbers = torch.cat([measures, runs.spans], dim=1)
        return torch.cat([numbers.view(torch.uint8).flatten(), runs.text[: CHARACTERS_PER_RUN * room]])
