"""The rows of the benchmark of codecs: one way to write embeddings, and what it does to masks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Embeddings of fp32 written and read again, and clicks decoded from them.

    Args:
        record_bytes: of an embedding in Redis, its header included.
        write_ms, read_ms: medians on the host, checksums included.
        mask_miou: mean IoU with masks of the embeddings as they were, same click and same mask token.
        worst_iou: of the click that differs most.
        index_flips: clicks for which another mask token is rated best.
    """

    codec: str
    record_bytes: int
    write_ms: float
    read_ms: float
    images: int
    clicks: int
    mask_miou: float
    worst_iou: float
    index_flips: int
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str, ...]:
        """What one run measures, and a later one replaces."""
        return self.gpu, self.codec
