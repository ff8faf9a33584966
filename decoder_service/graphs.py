"""The decoder's network as CUDA graphs: a tile costs one copy of its numbers and one launch instead of two hundred.

There is a graph for each number of prompts (powers of two; a tile is filled up with its own first prompt), of tokens
(fillers included) and of masks. Tiles of a shape that was not captured run launch by launch.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged
from torch.nn import functional as F

from splitsam.common.shapes import EMBEDDING_SHAPE
from splitsam.common.transfers import pinned, upload
from splitsam.decoder_service.addressed import AddressedPixels
from splitsam.decoder_service.network import KERNEL_WIDTHS, OUTPUT_TOKENS, Network, Prediction
from splitsam.decoder_service.packing import Tile
from splitsam.decoder_service.prepared import PreparedEmbedding

CAPTURED_MASKS = (1, 3)
WARM_UP_CALLS = 2
Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class _Graph:
    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    prediction: Prediction


class TileRunner:
    """Runs tiles of prompts filled up to `KERNEL_WIDTHS` through `AddressedPixels`. One thread at a time may call it.

    Args:
        max_prompts: in a tile.
    """

    def __init__(self, network: Network, max_prompts: int):
        self._network = network
        self._sizes = [1 << i for i in range(max_prompts.bit_length()) if 1 << i <= max_prompts]
        if self._sizes[-1] != max_prompts:
            self._sizes.append(max_prompts)
        self._graphs: dict[Shape, _Graph] = {}

    def capture(self) -> None:
        """Capture the usual shapes, the largest first: its memory serves all."""
        blank = self._network.prepare(torch.zeros(EMBEDDING_SHAPE))
        with torch.cuda.device(self._network.device):
            pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            for prompts, tokens, masks in itertools.product(reversed(self._sizes), KERNEL_WIDTHS, CAPTURED_MASKS):
                row = pack_numbers(
                    [blank.rows.data_ptr()], np.zeros((1, tokens, 2)), np.zeros((1, tokens)), np.zeros((1, masks))
                )
                numbers = torch.from_numpy(np.repeat(row, prompts, axis=0)).to(self._network.device)
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP_CALLS):
                        self._predict(numbers, tokens, masks)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                # Only this thread's calls count: others, such as those that prepare embeddings, go on meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    prediction = self._predict(numbers, tokens, masks)
                self._graphs[prompts, tokens, masks] = _Graph(graph, numbers, prediction)
            torch.cuda.synchronize()

    def run(self, tile: Tile, sources: Sequence[PreparedEmbedding]) -> Prediction:
        """Predict a tile's masks; returns before they are there. The caller keeps the sources until they are."""
        addresses = np.repeat([source.rows.data_ptr() for source in sources], np.diff(tile.offsets)).tolist()
        count, (tokens, masks) = len(addresses), (tile.kinds.shape[1], tile.wanted.shape[1])
        row_numbers = pack_numbers(addresses, tile.coords, tile.kinds, tile.wanted)
        size = next(size for size in self._sizes if size >= count)
        captured = self._graphs.get((size, tokens, masks))
        if captured is None:
            return self._predict(upload(row_numbers, self._network.device), tokens, masks)
        filled = np.concatenate([row_numbers, np.repeat(row_numbers[:1], size - count, axis=0)])
        captured.numbers.copy_(pinned(filled, self._network.device), non_blocking=True)
        captured.graph.replay()
        # The next tile of this shape overwrites what is not taken out now.
        found = captured.prediction
        return Prediction(found.logits[:count].clone(), found.scores[:count].clone())

    def _predict(self, numbers: Tensor, tokens: int, masks: int) -> Prediction:
        """From the rows of `pack_numbers` on the device."""
        addresses = numbers[:, :2].flatten().view(torch.int64)
        coords = numbers[:, 2 : 2 + 2 * tokens].view(torch.float32).reshape(-1, tokens, 2)
        kinds = numbers[:, 2 + 2 * tokens : 2 + 3 * tokens].long()
        wanted = numbers[:, 2 + 3 * tokens : 2 + 3 * tokens + masks].long()
        embedded = self._network.embed(coords, kinds)
        barred = F.pad(torch.where(kinds < 0, float("-inf"), 0.0), (OUTPUT_TOKENS, 0))
        # Each prompt finds its source by itself, so each is a source of its own here.
        offsets = torch.arange(len(numbers) + 1, device=numbers.device)
        jagged = nested_tensor_from_jagged(embedded, offsets)
        pixels = AddressedPixels(addresses, self._network.positions, barred)
        return self._network.predict(jagged, pixels, wanted)


def pack_numbers(
    addresses: Sequence[int],
    coords: npt.NDArray[np.floating],
    kinds: npt.NDArray[np.generic],
    wanted: npt.NDArray[np.generic],
) -> npt.NDArray[np.int32]:
    """All that a tile says, as one array for one copy: a row for each prompt, of 4-byte words.

    Args:
        addresses: of P prompts.
        coords: [P, T, 2]; kinds: [P, T]; wanted: [P, K].

    Returns:
        [P, 2 + 3 T + K]: the address, the coordinates as float32, kinds, wanted.
    """
    count = len(addresses)
    parts = (
        np.asarray(addresses, np.int64).view(np.int32).reshape(count, 2),
        np.ascontiguousarray(coords, np.float32).view(np.int32).reshape(count, -1),
        kinds.astype(np.int32),
        wanted.astype(np.int32),
    )
    return np.concatenate(parts, axis=1)
