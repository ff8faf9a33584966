"""The rows of the gateway benchmark: clicks made in one way."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Clicks on an image whose embedding is resident, one after the other, in turn with those of the other ways.

    Args:
        way: `client` calls the decoder over gRPC, `gateway` asks `/v1/masks`, `pointer` a WebSocket at `/v1/pointer`.
        ms_p50, ms_p99: from the click to its mask as COCO's RLE.
        added_ms_p50: the median of what each click took longer than the client's just before it.
    """

    way: str
    clicks: int
    ms_p50: float
    ms_p99: float
    added_ms_p50: float
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str, ...]:
        """What one run measures, and a later one replaces."""
        return self.gpu, self.way
