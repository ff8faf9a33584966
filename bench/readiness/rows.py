"""The rows of the readiness benchmark: one start of the encoder service."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One start.

    Args:
        cache: `cold` with nothing compiled before, `warm` with what the start before it has left on disk.
        batch_sizes: each of which is compiled for and becomes a CUDA graph.
        rungs: what the service said it runs.
        ready_s: from the start of the process until its health is SERVING, weights verified and loaded.
        first_encode_ms: of the first photograph sent, over gRPC.
        second_encode_ms: of the same once more; nothing is cached without Redis.
    """

    model: str
    precision: str
    batch_sizes: str
    cache: str
    rungs: str
    ready_s: float
    first_encode_ms: float
    second_encode_ms: float
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str, ...]:
        """What one start measures, and a later one replaces."""
        return self.gpu, self.model, self.precision, self.batch_sizes, self.cache
